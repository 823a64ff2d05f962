/*
 * What every block device has in common: the checks before a request, the accounts after it, and the ends
 * of a handle's life.
 *
 * A RESET that has only to wait works by epochs. Each request carries the epoch of its submission; the
 * reset flips it and counts down what completes with the old one. A second reset waits in line for the
 * first, so that two epochs are enough.
 */
#include "bdev/bdev.h"

#include <errno.h>
#include <string.h>

#include "bdev/qos.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

#define OP(op) (1U << (op))
#define HAVE_NO_RANGE (OP(BDEV_FLUSH) | OP(BDEV_RESET))
#define CHANGE_DATA (OP(BDEV_WRITE) | OP(BDEV_UNMAP) | OP(BDEV_WRITE_ZEROES))

_Static_assert(sizeof(struct bdev_stats) <= REACTOR_SLOT_SIZE, "statistics must fit in a slot");
_Static_assert(BDEV_OPS == sizeof(((struct bdev_stats *)0)->ops) / sizeof(uint64_t),
	       "one counter an operation");
_Static_assert(BDEV_READ == 0 && BDEV_WRITE == 1 && BDEV_FLUSH == 2 && BDEV_UNMAP == 3,
	       "the extremes of latency are kept for the first four operations");

void bdev_init(struct bdev *bdev, const struct bdev_ops *ops, struct reactor *reactor, uint64_t id,
	       uint32_t slot, uint32_t block_size, uint64_t block_count, uint32_t supported, bool readonly)
{
	*bdev = (struct bdev){
	    .ops = ops,
	    .reactor = reactor,
	    .stats = reactor_slot(reactor, slot),
	    .id = id,
	    .size = block_count * block_size,
	    .block_size = block_size,
	    .supported = readonly ? supported & ~CHANGE_DATA : supported,
	    .readonly = readonly,
	};
	/* The slot outlives a reactor that was killed, but not what that had in flight. */
	bdev->stats->in_flight = 0;
}

/* 0 if @io may start, else what to fail it with. */
static int check(const struct bdev *bdev, const struct bdev_io *io)
{
	uint32_t op = io->op < BDEV_OPS ? OP(io->op) : 0;

	if (unlikely(bdev->removed)) {
		return -ENODEV;
	}
	if (unlikely(!(op & bdev->supported))) {
		return bdev->readonly && (op & CHANGE_DATA) ? -EROFS : -EOPNOTSUPP;
	}
	if (op & HAVE_NO_RANGE) {
		return 0;
	}
	if (unlikely((io->offset | io->length) & (bdev->block_size - 1))) {
		return -EINVAL;
	}
	if (unlikely(io->offset > bdev->size || io->length > bdev->size - io->offset)) {
		return -ERANGE;
	}
	return 0;
}

void bdev_submit(struct bdev_io *io)
{
	struct bdev *bdev = io->bdev;
	int error = check(bdev, io);

	if (unlikely(error)) {
		bdev->stats->errors++;
		io->done(io, error);
		return;
	}
	io->submitted = reactor_now(bdev->reactor);
	io->epoch = bdev->epoch;
	bdev->stats->in_flight = ++bdev->in_flight;
	if (unlikely(!io->length && !(OP(io->op) & HAVE_NO_RANGE))) {
		bdev_complete(io, 0);
		return;
	}
	if (unlikely(bdev->qos)) {
		qos_submit(bdev->qos, io);
		return;
	}
	bdev->ops->submit(bdev, io);
}

static void account(struct bdev_stats *stats, const struct bdev_io *io, int status, uint64_t now)
{
	/* What completes in the turn of its submission took less than can be told: one tick. */
	uint64_t ticks = now > io->submitted ? now - io->submitted : 1;
	unsigned op = io->op;

	stats->ops[op]++;
	stats->ticks[op] += ticks;
	if (likely(status == 0)) {
		stats->bytes[op] += io->length;
	} else {
		stats->errors++;
	}
	if (op <= BDEV_UNMAP) {
		if (ticks > stats->max_ticks[op]) {
			stats->max_ticks[op] = ticks;
		}
		if (ticks < stats->min_ticks[op] || !stats->min_ticks[op]) {
			stats->min_ticks[op] = ticks;
		}
	}
}

static void begin_reset(struct bdev *bdev)
{
	unsigned waiting = 0;

	bdev->epoch ^= 1;
	for (struct bdev_io *reset = bdev->resets; reset; reset = reset->next) {
		reset->epoch = bdev->epoch;
		waiting++;
	}
	bdev->before_reset = bdev->in_flight - waiting;
}

/* Complete the resets, in their order, that nothing is left to wait for. */
static void end_resets(struct bdev *bdev)
{
	while (bdev->resets && !bdev->before_reset) {
		struct bdev_io *reset = bdev->resets;

		bdev->resets = reset->next;
		if (bdev->resets) {
			begin_reset(bdev);
		}
		bdev_complete(reset, 0);
	}
}

void bdev_complete_when_quiet(struct bdev_io *io)
{
	struct bdev *bdev = io->bdev;
	struct bdev_io **last = &bdev->resets;

	while (*last) {
		last = &(*last)->next;
	}
	io->next = NULL;
	*last = io;
	if (bdev->resets == io) {
		begin_reset(bdev);
		end_resets(bdev);
	}
}

static void notify_if_drained(struct bdev *bdev)
{
	if (bdev->removed && !bdev->in_flight && !bdev->drained) {
		bdev->drained = true;
		reactor_notify(bdev->reactor, bdev->id, NOTICE_DRAINED, 0, "nothing is in flight");
	}
}

void bdev_complete(struct bdev_io *io, int status)
{
	struct bdev *bdev = io->bdev;
	bool awaited = io->epoch != bdev->epoch;

	bdev->stats->in_flight = --bdev->in_flight;
	if (likely(status != -ECANCELED)) {
		account(bdev->stats, io, status, reactor_now(bdev->reactor));
	}
	io->done(io, status); /* @io may be gone */
	if (unlikely(awaited)) {
		bdev->before_reset--;
		end_resets(bdev);
	}
	if (unlikely(bdev->removed)) {
		notify_if_drained(bdev);
	}
}

void bdev_remove(struct bdev *bdev)
{
	if (!bdev->removed) {
		bdev->removed = true;
		if (bdev->qos) {
			qos_fail_waiting(bdev->qos, -ENODEV);
		}
		if (bdev->ops->remove) {
			bdev->ops->remove(bdev);
		}
		notify_if_drained(bdev);
	}
}

void bdev_cancel(struct bdev *bdev, bool (*mine)(const struct bdev_io *io, const void *whose),
		 const void *whose)
{
	if (bdev->qos) {
		qos_cancel(bdev->qos, mine, whose);
	}
}

int bdev_set_blocks(struct bdev *bdev, uint64_t block_count)
{
	uint64_t size = block_count * bdev->block_size;
	int error = bdev->ops->resize ? bdev->ops->resize(bdev, size) : 0;

	if (!error) {
		bdev->size = size;
	}
	return error;
}

int bdev_close(struct bdev *bdev)
{
	if (bdev->in_flight) {
		return -EBUSY;
	}
	qos_free(bdev->qos);
	bdev->ops->close(bdev);
	return 0;
}

uint64_t bdev_in_flight(const struct bdev *bdev)
{
	return bdev->in_flight;
}

uint64_t bdev_size(const struct bdev *bdev)
{
	return bdev->size;
}

uint32_t bdev_block_size(const struct bdev *bdev)
{
	return bdev->block_size;
}

uint32_t bdev_supported(const struct bdev *bdev)
{
	return bdev->supported;
}

bool bdev_readonly(const struct bdev *bdev)
{
	return bdev->readonly;
}
