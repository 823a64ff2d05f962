#include "bdev/measure.h"

#include <errno.h>
#include <sys/mman.h>

#define DEPTH 128
#define LONGEST (1u << 20)

/* One at a time in a process, which has one thread for this. */
static struct {
	struct bdev_io io[DEPTH];
	struct iovec iov;
	uint32_t under_way;
	int error; /* the first */
} run;

static void request_done(struct bdev_io *io, int status)
{
	(void)io;
	run.under_way--;
	if (__builtin_expect(status, 0) && !run.error) {
		run.error = status;
	}
}

static void submit_batch(struct bdev *bdev, const struct bdev_measure *setup, uint64_t *offset)
{
	for (uint32_t i = 0; i < setup->depth; i++) {
		struct bdev_io *io = &run.io[i];

		io->bdev = bdev;
		io->done = request_done;
		io->iov = &run.iov;
		io->iovcnt = 1;
		io->op = (uint8_t)setup->op;
		io->flags = 0;
		io->offset = *offset;
		io->length = setup->length;
		*offset += setup->length;
		if (*offset + setup->length > bdev->size) {
			*offset = 0;
		}
		run.under_way++;
		bdev_submit(io);
	}
}

static bool is_possible(const struct bdev *bdev, const struct bdev_measure *setup)
{
	return setup->op <= BDEV_WRITE && setup->depth && setup->depth <= DEPTH && setup->length <= LONGEST &&
	       setup->length <= bdev->size;
}

uint64_t bdev_measure(struct bdev *bdev, const struct bdev_measure *setup, int *error)
{
	struct reactor_event events[4];
	uint64_t begun, ticks, offset = 0;
	void *data;

	*error = is_possible(bdev, setup) ? 0 : -EINVAL;
	if (*error) {
		return 0;
	}
	data = mmap(NULL, LONGEST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (data == MAP_FAILED) {
		*error = -errno;
		return 0;
	}
	run.iov = (struct iovec){data, setup->length};
	run.error = 0;
	begun = reactor_ticks();
	for (uint64_t batch = 0; batch < setup->batches && !run.error; batch++) {
		submit_batch(bdev, setup, &offset);
		while (run.under_way) {
			reactor_poll(bdev->reactor, 0, events, 0);
		}
	}
	ticks = reactor_ticks() - begun;
	munmap(data, LONGEST);
	*error = run.error;
	return run.error ? 0 : ticks;
}
