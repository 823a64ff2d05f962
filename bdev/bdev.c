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

#include "bdev/detour.h"
#include "bdev/divide.h"
#include "bdev/emulate.h"
#include "bdev/qos.h"
#include "bdev/ranges.h"
#include "bdev/watch.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

#define OP(op) (1U << (op))
#define EPOCH 1U /* the bit of bdev->epoch and io->epoch that RESET is about */
#define WRITER_MARKS ((unsigned)BDEV_MARK_WRITER | BDEV_MARK_ODD) /* of a request alone, never of a handle */
#define CHANGE_DATA                                                                                            \
	(OP(BDEV_WRITE) | OP(BDEV_UNMAP) | OP(BDEV_WRITE_ZEROES) | OP(BDEV_COMPARE_AND_WRITE) | OP(BDEV_COPY))

_Static_assert(sizeof(struct bdev_stats) <= REACTOR_SLOT_SIZE, "statistics must fit in a slot");
_Static_assert(sizeof(struct bdev_histograms) <= REACTOR_ANNEX_SIZE, "histograms must fit in an annex");
_Static_assert(BDEV_ALL_OPS == sizeof(((struct bdev_stats *)0)->ops) / sizeof(uint64_t),
	       "one counter an operation");
_Static_assert(BDEV_ALL_OPS <= 32, "a bit an operation");
_Static_assert(BDEV_DEVICE_OPS == OP(BDEV_OPS) - 1, "all before BDEV_OPS");
_Static_assert(BDEV_HISTOGRAM_BUCKETS == BDEV_HISTOGRAM_RANGES << BDEV_HISTOGRAM_BITS, "all ranges");

/* What the device carries out, and what can be made of that without saying anything untrue. */
static uint32_t with_emulated(uint32_t native)
{
	uint32_t emulated = 0;

	if (native & OP(BDEV_READ)) {
		emulated |= OP(BDEV_COMPARE) | OP(BDEV_VERIFY);
	}
	if (native & OP(BDEV_WRITE)) {
		emulated |= OP(BDEV_WRITE_ZEROES);
	}
	if (native & OP(BDEV_READ) && native & OP(BDEV_WRITE)) {
		emulated |= OP(BDEV_COPY) | OP(BDEV_COMPARE_AND_WRITE);
	}
	return native | emulated;
}

void bdev_set_supported(struct bdev *bdev, uint32_t native, bool readonly)
{
	bdev->readonly = readonly;
	bdev->native = readonly ? native & ~CHANGE_DATA : native;
	bdev->supported = with_emulated(bdev->native);
	detour_update(bdev);
}

void bdev_init(struct bdev *bdev, const struct bdev_ops *ops, struct reactor *reactor, uint64_t id,
	       uint32_t slot, uint32_t block_size, uint64_t block_count, uint32_t supported, bool readonly)
{
	*bdev = (struct bdev){
	    .ops = ops,
	    .reactor = reactor,
	    .stats = reactor_slot(reactor, slot),
	    .histograms = reactor_annex(reactor, slot),
	    .id = id,
	    .size = block_count * block_size,
	    .easy_length = BDEV_EASY,
	    .easy_segments = UINT32_MAX,
	    .block_mask = block_size - 1,
	    .block_size = block_size,
	};
	bdev_set_supported(bdev, supported, readonly);
	/* The slot outlives a reactor that was killed, but not what that had in flight. */
	bdev->stats->in_flight = 0;
}

static int check_more(const struct bdev *bdev, const struct bdev_io *io)
{
	if (io->op == BDEV_COPY) {
		if (io->source & (bdev->block_size - 1)) {
			return -EINVAL;
		}
		if (io->source > bdev->size || io->length > bdev->size - io->source) {
			return -ERANGE;
		}
	}
	if (io->op == BDEV_COMPARE_AND_WRITE) {
		if (!bdev->ranges) {
			return -EOPNOTSUPP;
		}
		return io->length > BDEV_ATOMIC_BYTES ? -EINVAL : 0;
	}
	return 0;
}

/* 0 if @io may start, else what to fail it with. */
static int check(const struct bdev *bdev, const struct bdev_io *io)
{
	uint32_t op = io->op < BDEV_ALL_OPS ? OP(io->op) : 0;

	if (unlikely(bdev->removed)) {
		return -ENODEV;
	}
	if (unlikely(!(op & bdev->supported))) {
		return bdev->readonly && (op & CHANGE_DATA) ? -EROFS : -EOPNOTSUPP;
	}
	if (op & BDEV_HAVE_NO_RANGE) {
		return 0;
	}
	if (unlikely((io->offset | io->length) & (bdev->block_size - 1))) {
		return -EINVAL;
	}
	if (unlikely(io->offset > bdev->size || io->length > bdev->size - io->offset)) {
		return -ERANGE;
	}
	return unlikely(io->op >= BDEV_OPS) ? check_more(bdev, io) : 0;
}

static inline void begin(struct bdev *bdev, struct bdev_io *io, uint8_t marks)
{
	io->submitted = reactor_now(bdev->reactor);
	io->epoch = bdev->epoch | marks;
	io->stage = BDEV_STAGE_DEVICE;
	bdev->stats->in_flight = ++bdev->in_flight;
}

/*
 * Is it one of @ops, all of which a device itself carries out, and within range and limits? Then it has passed
 * all of check(), and has a length.
 */
static inline bool is_plain(const struct bdev *bdev, const struct bdev_io *io, uint32_t ops)
{
	uint64_t end = io->offset + io->length;

	/* The sum is past the offset unless there is no length, or one that no size allows. */
	return ops >> (io->op & 31) & 1 && !((io->offset | io->length) & bdev->block_mask) &&
	       end <= bdev->size && io->offset < end &&
	       (io->offset & bdev->easy_mask) + io->length <= bdev->easy_length &&
	       io->iovcnt <= bdev->easy_segments;
}

/* A request that cannot start, has nothing to do, or does not go straight to the device. */
__attribute__((noinline)) static void submit_other(struct bdev_io *io)
{
	struct bdev *bdev = io->bdev;
	int error;

	if (likely(is_plain(bdev, io, bdev->plain))) {
		begin(bdev, io, 0);
		detour_start(io);
		return;
	}
	error = check(bdev, io);
	if (error) {
		bdev->stats->errors++;
		io->done(io, error);
		return;
	}
	begin(bdev, io, 0);
	if (!io->length && !(OP(io->op) & BDEV_HAVE_NO_RANGE)) {
		bdev_complete(io, 0);
	} else {
		detour_start(io);
	}
}

void bdev_submit(struct bdev_io *io)
{
	struct bdev *bdev = io->bdev;

	if (likely(is_plain(bdev, io, bdev->direct))) {
		begin(bdev, io, 0);
		bdev->ops->submit(bdev, io);
	} else if (likely(is_plain(bdev, io, bdev->guarded))) {
		uint8_t marks = ranges_enter(bdev->ranges);

		begin(bdev, io, marks);
		if (likely(marks)) {
			bdev->ops->submit(bdev, io);
		} else {
			detour_start(io);
		}
	} else {
		submit_other(io);
	}
}

/* The histogram's ranges begin at powers of two: the highest bit says which one, those after it where. */
static inline uint32_t bucket_of(uint64_t ticks)
{
	unsigned high = 63 - (unsigned)__builtin_clzll(ticks | 1U << BDEV_HISTOGRAM_BITS);
	uint64_t range = high - BDEV_HISTOGRAM_BITS, bucket;

	/* The first of the bits counts as one range more, but where it is not set. */
	bucket = (range << BDEV_HISTOGRAM_BITS) + (ticks >> range);
	return likely(bucket < BDEV_HISTOGRAM_BUCKETS) ? (uint32_t)bucket : BDEV_HISTOGRAM_BUCKETS - 1;
}

uint32_t bdev_histogram_bucket(uint64_t ticks)
{
	return bucket_of(ticks);
}

static inline void account(const struct bdev *bdev, const struct bdev_io *io, int status, uint64_t now)
{
	if (likely(status != -ECANCELED)) { /* aborted: it counts as not made */
		uint64_t ticks = bdev_count(bdev->stats, io, status, now);

		bdev->histograms->bucket[io->op][bucket_of(ticks)]++;
	}
}

static void begin_reset(struct bdev *bdev)
{
	unsigned waiting = 0;

	bdev->epoch ^= EPOCH;
	for (struct bdev_io *reset = bdev->resets; reset; reset = reset->next) {
		reset->epoch = (uint8_t)((reset->epoch & ~EPOCH) | (bdev->epoch & EPOCH));
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
	if (bdev->removed && !bdev->in_flight && !bdev->held && !bdev->drained) {
		bdev->drained = true;
		reactor_notify(bdev->reactor, bdev->id, NOTICE_DRAINED, 0, "nothing is in flight");
	}
}

/*
 * The end of a request that has failed, is a part of another, is awaited by a RESET, or made a detour; or of
 * any when the handle was removed.
 */
__attribute__((noinline)) static void complete_special(struct bdev_io *io, int status)
{
	struct bdev *bdev = io->bdev;
	bool awaited = (io->epoch ^ bdev->epoch) & EPOCH;

	if (io->epoch & BDEV_MARK_PART) {
		io->done(io, status);
		return;
	}
	detour_end(io, status);
	bdev->stats->in_flight = --bdev->in_flight;
	account(bdev, io, status, reactor_now(bdev->reactor));
	io->done(io, status); /* @io may be gone */
	if (awaited) {
		bdev->before_reset--;
		end_resets(bdev);
	}
	notify_if_drained(bdev);
}

void bdev_complete(struct bdev_io *io, int status)
{
	struct bdev *bdev = io->bdev;

	if (io->epoch != bdev->epoch || unlikely(status)) {
		if (unlikely((io->epoch ^ bdev->epoch) & ~WRITER_MARKS || status)) {
			complete_special(io, status);
			return;
		}
		ranges_leave(bdev->ranges, io);
	}
	bdev->stats->in_flight = --bdev->in_flight;
	account(bdev, io, 0, reactor_now(bdev->reactor));
	io->done(io, 0);
}

void bdev_hold(struct bdev *bdev)
{
	bdev->held++;
}

void bdev_release(struct bdev *bdev)
{
	bdev->held--;
	notify_if_drained(bdev);
}

void bdev_remove(struct bdev *bdev)
{
	if (!bdev->removed) {
		bdev->removed = true;
		bdev->epoch |= BDEV_MARK_REMOVED; /* what is in flight was submitted without */
		detour_update(bdev);
		if (bdev->qos) {
			qos_fail_waiting(bdev->qos, -ENODEV);
		}
		if (bdev->ranges) {
			ranges_fail_waiting(bdev->ranges, -ENODEV);
		}
		if (bdev->ops->remove) {
			bdev->ops->remove(bdev);
		}
		notify_if_drained(bdev);
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
	if (bdev->in_flight || bdev->held) {
		return -EBUSY;
	}
	qos_free(bdev->qos);
	ranges_free(bdev->ranges);
	watch_free(bdev->watch);
	emulator_free(bdev->emulator);
	divider_free(bdev->divider);
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
