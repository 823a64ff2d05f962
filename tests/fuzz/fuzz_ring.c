/*
 * A hostile driver, played by a fuzzer: whatever stands in guest memory and in the in-flight log, and however
 * both change between turns, the real queue, virtio-blk and malloc disk serve it or break the queue.
 *
 * An input is a struct setup, then steps. A step is a byte that says what happens, and what that needs; the
 * kinds are in step(). What goes beyond a mapping hits a guard page, since mmap() is wrapped; the rest is
 * AddressSanitizer's, UndefinedBehaviorSanitizer's, and what settle() and end() check.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bdev/malloc.h"
#include "vhost/blk.h"

#define USER_BASE 0x700000000000ull
#define PAGE 4096
#define MEMORY (8 * PAGE)
#define DISK_BLOCKS 32
#define DISK (DISK_BLOCKS * 512)
#define MAX_RING 64
#define MAX_STEPS 32
#define DRAIN_TURNS 64

#define REQUIRE(condition)                                                                                     \
	do {                                                                                                   \
		if (!(condition)) {                                                                            \
			fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);              \
			abort();                                                                               \
		}                                                                                              \
	} while (0)

/* --- guard pages ------------------------------------------------------------------------------------ */

void *__real_mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset);
int __real_munmap(void *address, size_t size);
void *__wrap_mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset);

static bool guarded; /* from now on */

/* A mapping that may be anywhere gets a page before and after it that nobody may touch. */
void *__wrap_mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset)
{
	size_t whole = (size + PAGE - 1) / PAGE * PAGE;
	char *space;

	if (!guarded || address != NULL) {
		return __real_mmap(address, size, protection, flags, fd, offset);
	}
	space =
	    __real_mmap(NULL, whole + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (space == MAP_FAILED) {
		return MAP_FAILED;
	}
	return __real_mmap(space + PAGE, size, protection, flags | MAP_FIXED, fd, offset);
}

int __wrap_munmap(void *address, size_t size);

int __wrap_munmap(void *address, size_t size)
{
	size_t whole = (size + PAGE - 1) / PAGE * PAGE;

	if (!guarded) {
		return __real_munmap(address, size);
	}
	return __real_munmap((char *)address - PAGE, whole + 2 * PAGE);
}

/* --- what stays from input to input ------------------------------------------------------------------ */

static struct reactor *reactor;
static struct bdev *disk;
static uint8_t *disk_bytes;
static uint8_t *memory;
static uint8_t *inflight;
static struct guest_memory *table;
static int inflight_fd;
static int kick_fd, call_fd, error_fd;

static uint8_t *share(const char *name, size_t size, int *fd)
{
	uint8_t *map;

	*fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	REQUIRE(*fd >= 0 && ftruncate(*fd, (off_t)size) == 0);
	map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
	REQUIRE(map != MAP_FAILED);
	return map;
}

/* Two regions that follow one another, and one behind a hole. */
static void map_guest_memory(int fd)
{
	struct guest_region regions[] = {
	    {.guest = 0, .size = 4 * PAGE, .user = USER_BASE, .offset = 0, .fd = fd},
	    {.guest = 4 * PAGE, .size = 2 * PAGE, .user = USER_BASE + 4 * PAGE, .offset = 4 * PAGE, .fd = fd},
	    {.guest = 16 * PAGE, .size = 2 * PAGE, .user = USER_BASE + 16 * PAGE, .offset = 6 * PAGE, .fd = fd},
	};

	table = guest_memory_create(regions, 3);
	REQUIRE(table != NULL);
}

static void set_up(void)
{
	int memory_fd, disk_fd;

	memory = share("guest", MEMORY, &memory_fd);
	inflight = share("inflight", vq_inflight_size(MAX_RING), &inflight_fd);
	disk_bytes = share("disk", DISK, &disk_fd);
	kick_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	call_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	error_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	REQUIRE(kick_fd >= 0 && call_fd >= 0 && error_fd >= 0);
	reactor = reactor_create(REACTOR_NEVER, 0, NULL, 0);
	REQUIRE(reactor != NULL && mapping_guard() == 0);
	disk = malloc_bdev_open(reactor, 1, 0, 512, DISK_BLOCKS, disk_fd, 0);
	REQUIRE(disk != NULL);
	guarded = true; /* the disk, which aligns its mapping, has no guards; what is unmapped later has */
	map_guest_memory(memory_fd);
}

/* --- one input --------------------------------------------------------------------------------------- */

enum {
	WITH_PACKED = 1 << 0,
	WITH_EVENT_IDX = 1 << 1,
	WITH_INDIRECT = 1 << 2,
	WITH_IN_ORDER = 1 << 3,
	WITH_NOTIFY_ON_EMPTY = 1 << 4,
	READ_ONLY = 1 << 5,
	WITH_LOG = 1 << 6, /* begin with what the log says */
	NO_KICKS = 1 << 7,
};

struct setup {
	uint8_t with;
	uint8_t size;
	uint16_t base[2];
} __attribute__((packed));

struct input {
	const uint8_t *at;
	size_t left;
};

struct drive {
	struct queue *queue;
	struct setup setup;
	unsigned size;
	unsigned broken;
	unsigned drained;
	uint32_t base;
};

static const void *take(struct input *input, size_t size)
{
	const uint8_t *at = input->at;

	if (size > input->left) {
		size = input->left;
	}
	input->at += size;
	input->left -= size;
	return at;
}

static void poll_turns(struct drive *drive, unsigned turns)
{
	struct reactor_event events[1];
	struct reactor_notice notice;

	for (unsigned i = 0; i < turns; i++) {
		REQUIRE(reactor_poll(reactor, 0, events, 1) >= 0);
		while (reactor_next_notice(reactor, &notice)) {
			drive->broken += notice.kind == NOTICE_BROKEN;
			drive->drained += notice.kind == NOTICE_DRAINED;
		}
	}
}

static void kick(const struct drive *drive)
{
	if (!(drive->setup.with & NO_KICKS)) {
		REQUIRE(eventfd_write(kick_fd, 1) == 0 || errno == EAGAIN);
	}
}

static void start(struct drive *drive, uint32_t base, bool recover)
{
	uint8_t with = drive->setup.with;
	struct blk_setup blk = {.readonly = with & READ_ONLY,
				.discard = true,
				.write_zeroes = true,
				.max_discard_sectors = 16,
				.max_discard_segments = 4,
				.serial = "fuzz"};
	struct vq_setup setup = {.id = 2,
				 .size = drive->size,
				 .base = base,
				 .features = 1ull << VIRTIO_F_VERSION_1,
				 .desc = USER_BASE,
				 .avail = USER_BASE + 0x800,
				 .used = USER_BASE + 0xc00,
				 .kick_fd = with & NO_KICKS ? -1 : kick_fd,
				 .call_fd = call_fd,
				 .error_fd = error_fd,
				 .inflight_fd = inflight_fd,
				 .inflight_size = vq_inflight_size(MAX_RING),
				 .recover = recover};

	setup.features |= with & WITH_PACKED ? 1ull << VIRTIO_F_RING_PACKED : 0;
	setup.features |= with & WITH_EVENT_IDX ? 1ull << VIRTIO_F_EVENT_IDX : 0;
	setup.features |= with & WITH_INDIRECT ? 1ull << VIRTIO_F_INDIRECT_DESC : 0;
	setup.features |= with & WITH_IN_ORDER ? 1ull << VIRTIO_F_IN_ORDER : 0;
	setup.features |= with & WITH_NOTIFY_ON_EMPTY ? 1ull << VIRTIO_F_NOTIFY_ON_EMPTY : 0;
	drive->broken = drive->drained = 0;
	drive->queue = blk_queue_start(reactor, table, disk, &setup, &blk);
	kick(drive);
}

/* Stop the queue, which always drains: the disk keeps nothing waiting. */
static void settle(struct drive *drive)
{
	if (drive->queue == NULL) {
		poll_turns(drive, 1);
		REQUIRE(guest_memory_references(table) == 1);
		return;
	}
	queue_stop(drive->queue);
	for (unsigned i = 0; i < DRAIN_TURNS && drive->drained == 0; i++) {
		poll_turns(drive, 1);
	}
	REQUIRE(drive->drained == 1);
	REQUIRE(drive->broken <= 1);
	REQUIRE(queue_in_flight(drive->queue) == 0);
	drive->base = queue_base(drive->queue);
	queue_free(drive->queue);
	drive->queue = NULL;
	REQUIRE(bdev_in_flight(disk) == 0);
	REQUIRE(guest_memory_references(table) == 1);
}

/* Overwrite a piece of @area: its offset, its length, its bytes. */
static void patch(struct input *input, uint8_t *area, size_t size)
{
	struct {
		uint16_t offset;
		uint8_t length;
	} __attribute__((packed)) piece = {0};
	size_t offset, length;
	const void *bytes;

	memcpy(&piece, input->at, input->left < sizeof(piece) ? input->left : sizeof(piece));
	take(input, sizeof(piece));
	offset = piece.offset % size;
	length = piece.length < size - offset ? piece.length : size - offset;
	length = length < input->left ? length : input->left;
	bytes = take(input, length);
	memcpy(area + offset, bytes, length);
}

static void step(struct drive *drive, struct input *input)
{
	uint8_t kind = *(const uint8_t *)take(input, 1);

	switch (kind % 8) {
	case 0: /* the driver writes something, and says so */
		patch(input, memory, MEMORY);
		kick(drive);
		poll_turns(drive, 2);
		break;
	case 1: /* it writes something and says nothing */
	case 2:
		patch(input, memory, MEMORY);
		break;
	case 3: /* it meddles with the log */
		patch(input, inflight, vq_inflight_size(MAX_RING));
		break;
	case 4: /* the queue is stopped and goes on */
		settle(drive);
		start(drive, drive->base, false);
		break;
	case 5: /* another process takes over */
		settle(drive);
		start(drive, drive->base, true);
		break;
	case 6:
		kick(drive);
		poll_turns(drive, 1);
		break;
	case 7: /* the disk goes away, or comes back */
		if (drive->queue != NULL) {
			blk_queue_set_bdev(drive->queue, kind & 8 ? disk : NULL);
		}
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = {.at = data, .left = size};
	struct drive drive = {0};
	uint8_t before[DISK];

	if (reactor == NULL) {
		set_up();
	}
	if (size < sizeof(drive.setup)) {
		return 0;
	}
	memcpy(&drive.setup, take(&input, sizeof(drive.setup)), sizeof(drive.setup));
	memset(memory, 0, MEMORY);
	memset(inflight, 0, vq_inflight_size(MAX_RING));
	for (unsigned i = 0; i < DISK; i++) {
		disk_bytes[i] = before[i] = (uint8_t)(i / 7);
	}
	drive.size = drive.setup.size % (MAX_RING + 1);
	if (!(drive.setup.with & WITH_LOG)) {
		start(&drive, drive.setup.base[0] | (uint32_t)drive.setup.base[1] << 16, false);
	}
	for (unsigned i = 0; i < MAX_STEPS && input.left > 0; i++) {
		step(&drive, &input);
	}
	poll_turns(&drive, 2);
	settle(&drive);
	if (drive.setup.with & READ_ONLY) {
		REQUIRE(memcmp(disk_bytes, before, DISK) == 0);
	}
	return 0;
}
