/*
 * The NVMe driver's way of a request, without a device's time: 4 KiB reads in batches, submitted to a queue
 * pair whose device is a few lines that complete everything at once. To be counted by callgrind:
 * benchmarks/nvme.py.
 *
 *	nvme_loop BATCHES DEPTH
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bdev/dma.h"
#include "bdev/nvme_disk.h"
#include "reactor/reactor.h"

#define BLOCK 4096
#define DEPTH_MAX 128
#define ENTRIES 256
#define DOORBELL (NVME_REG_DOORBELLS + 8)

static unsigned completed;

/* The end of a request, which is the caller's. */
__attribute__((noinline)) static void request_done(struct bdev_io *io, int status)
{
	(void)io;
	completed += status == 0;
}

struct device {
	struct nvme_command *submission;
	volatile struct nvme_completion *completion;
	volatile uint32_t *doorbell;
	uint32_t head;
	uint32_t tail;
	uint16_t phase;
};

__attribute__((noinline)) static void device_step(struct device *device)
{
	while (device->head != *device->doorbell) {
		volatile struct nvme_completion *entry = &device->completion[device->tail];

		entry->cid = device->submission[device->head].cid;
		entry->status = device->phase;
		device->head = (device->head + 1) % ENTRIES;
		device->tail = (device->tail + 1) % ENTRIES;
		device->phase ^= device->tail == 0;
	}
}

static int memory_of(const char *name, size_t size, void **map)
{
	int fd = memfd_create(name, MFD_CLOEXEC);

	if (fd < 0 || ftruncate(fd, (off_t)size) < 0) {
		perror(name);
		exit(1);
	}
	*map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (*map == MAP_FAILED) {
		perror(name);
		exit(1);
	}
	return fd;
}

static void run_batch(struct reactor *reactor, struct device *device, struct bdev_io *ios, unsigned depth)
{
	unsigned target = completed + depth;
	struct reactor_event event;

	for (unsigned i = 0; i < depth; i++) {
		bdev_submit(&ios[i]);
	}
	reactor_poll(reactor, 0, &event, 1);
	device_step(device);
	while (completed != target) {
		reactor_poll(reactor, 0, &event, 1);
	}
}

int main(int argc, char **argv)
{
	unsigned batches = argc > 2 ? (unsigned)atoi(argv[1]) : 0;
	unsigned depth = argc > 2 ? (unsigned)atoi(argv[2]) : 0;
	struct nvme_queue_layout layout;
	void *memory, *registers, *data;
	struct bdev_io ios[DEPTH_MAX];
	struct iovec iovs[DEPTH_MAX];

	if (!batches || !depth || depth > DEPTH_MAX) {
		fprintf(stderr, "usage: nvme_loop BATCHES DEPTH, up to %d\n", DEPTH_MAX);
		return 2;
	}
	nvme_queue_layout(ENTRIES, 1, &layout);
	struct nvme_queue_setup queue = {
	    .key = 1,
	    .memory = memory_of("queue", layout.size, &memory),
	    .registers = memory_of("registers", 2 * NVME_REG_DOORBELLS, &registers),
	    .interrupt = -1,
	    .shadow = -1,
	    .depth = ENTRIES,
	    .bounces = 1,
	    .iova = 1 << 20,
	    .registers_size = 2 * NVME_REG_DOORBELLS,
	    .submission_doorbell = DOORBELL,
	    .completion_doorbell = DOORBELL + 4,
	    .direct = true,
	};
	struct nvme_disk_setup disk = {
	    .nsid = 1, .block_size = 512, .block_count = 1 << 20, .max_transfer = 1 << 20, .cache = true};
	struct reactor *reactor = reactor_create(REACTOR_ALWAYS, 0, NULL, 0);
	struct bdev *bdev = reactor ? nvme_disk_open(reactor, 1, 0, &disk, &queue) : NULL;
	struct device device = {
	    .submission = (struct nvme_command *)((char *)memory + layout.submission),
	    .completion = (struct nvme_completion *)((char *)memory + layout.completion),
	    .doorbell = (uint32_t *)((char *)registers + DOORBELL),
	    .phase = 1,
	};

	memory_of("data", DEPTH_MAX * BLOCK, &data);
	if (!bdev || dma_range_add(data, DEPTH_MAX * BLOCK, 1ULL << 32)) {
		perror("nvme_loop");
		return 1;
	}
	for (unsigned i = 0; i < depth; i++) {
		iovs[i] = (struct iovec){.iov_base = (char *)data + i * BLOCK, .iov_len = BLOCK};
		ios[i] = (struct bdev_io){
		    .bdev = bdev,
		    .done = request_done,
		    .iov = &iovs[i],
		    .iovcnt = 1,
		    .op = BDEV_READ,
		    .offset = i * BLOCK,
		    .length = BLOCK,
		};
	}
	while (batches--) {
		run_batch(reactor, &device, ios, depth);
	}
	printf("%u\n", completed);
	return bdev_close(bdev) ? 1 : 0;
}
