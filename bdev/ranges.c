#include "bdev/ranges.h"

#include <errno.h>
#include <stdlib.h>

#define RETRY_NS 20000

#define OP(op) (1U << (op))
#define BEFORE 2 /* counter of those that began before there were counters */

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

/* --- those who change data ----------------------------------------------------------------------------- */

/* False: a range that it would change is locked. */
static bool begin_write(struct bdev_ranges *ranges, struct bdev_io *io)
{
	const struct range_table *table = ranges->table;
	size_t odd = ranges_count_writer(ranges);

	if (range_table_is_used(table) && range_table_covers(table, io->offset, io->length)) {
		ranges_count(ranges, odd, -1);
		return false;
	}
	io->epoch |= ranges_marks(odd);
	return true;
}

static void serve(struct bdev_ranges *ranges);

void ranges_submit(struct bdev_ranges *ranges, struct bdev_io *io)
{
	bool writes = OP(io->op) & RANGE_WRITERS && !(io->flags & BDEV_IO_LOCKED);

	if (!writes || begin_write(ranges, io)) {
		detour_past_ranges(io);
		return;
	}
	io->next = NULL;
	*ranges->held_end = io;
	ranges->held_end = &io->next;
	serve(ranges);
}

void ranges_end(struct bdev_ranges *ranges, struct bdev_io *io)
{
	if (io->epoch & BDEV_MARK_WRITER) {
		ranges_leave(ranges, io);
	} else if (!(io->epoch & BDEV_MARK_COUNTED)) {
		ranges_count(ranges, BEFORE, -1);
	}
}

static void retry_held(struct bdev_ranges *ranges)
{
	struct bdev_io *io = ranges->held;

	ranges->held = NULL;
	ranges->held_end = &ranges->held;
	while (io) {
		struct bdev_io *next = io->next;

		if (begin_write(ranges, io)) {
			detour_past_ranges(io);
		} else {
			io->next = NULL;
			*ranges->held_end = io;
			ranges->held_end = &io->next;
		}
		io = next;
	}
}

/* --- those who lock ------------------------------------------------------------------------------------- */

static void append(struct bdev_locks *locks, struct bdev_lock *lock)
{
	lock->next = NULL;
	*locks->end = lock;
	locks->end = &lock->next;
}

static struct bdev_lock *take_all(struct bdev_locks *locks)
{
	struct bdev_lock *first = locks->first;

	locks->first = NULL;
	locks->end = &locks->first;
	return first;
}

static void expect_all(const struct bdev_ranges *ranges, struct bdev_lock *lock)
{
	for (unsigned which = 0; which < 3; which++) {
		for (uint32_t i = 0; i < RANGE_OWNERS / 64; i++) {
			lock->busy[which][i] = 0;
		}
		for (uint32_t i = 0; i < ranges->table->owners; i++) {
			lock->busy[which][i / 64] |= 1ull << i % 64;
		}
	}
}

/* Strike out those who were not seen to be idle, but are now. False: all were, once. */
static bool is_awaited(struct bdev_ranges *ranges, struct bdev_lock *lock, unsigned which)
{
	uint64_t left = 0;

	for (uint32_t i = 0; i < ranges->table->owners; i++) {
		uint64_t *word = &lock->busy[which][i / 64], bit = 1ull << i % 64;

		if (*word & bit &&
		    !__atomic_load_n(&ranges->table->owner[i].writers[which], __ATOMIC_ACQUIRE)) {
			*word &= ~bit;
		}
		left |= *word;
	}
	return left;
}

static bool is_settled(struct bdev_ranges *ranges, struct bdev_lock *lock)
{
	unsigned now = __atomic_load_n(&ranges->table->epoch, __ATOMIC_RELAXED) & 1;
	bool settled = true;

	for (unsigned which = 0; which < 3; which++) {
		if (is_awaited(ranges, lock, which)) {
			settled = false;
			if (which == now) { /* have those who begin from now on count elsewhere */
				__atomic_store_n(&ranges->table->epoch, now ^ 1, __ATOMIC_RELAXED);
			}
		}
	}
	return settled;
}

static void retry_wanted(struct bdev_ranges *ranges)
{
	for (struct bdev_lock *lock = take_all(&ranges->wanted), *next; lock; lock = next) {
		next = lock->next;
		lock->entry = range_table_take(ranges->table, ranges->owner, lock->offset, lock->length);
		if (lock->entry < 0) {
			append(&ranges->wanted, lock);
		} else {
			expect_all(ranges, lock);
			barrier_everywhere();
			append(&ranges->settling, lock);
		}
	}
}

static void retry_settling(struct bdev_ranges *ranges)
{
	for (struct bdev_lock *lock = take_all(&ranges->settling), *next; lock; lock = next) {
		next = lock->next;
		if (is_settled(ranges, lock)) {
			lock->granted(lock, 0);
		} else {
			append(&ranges->settling, lock);
		}
	}
}

int bdev_lock_range(struct bdev *bdev, struct bdev_lock *lock)
{
	if (!bdev->ranges) {
		return -EOPNOTSUPP;
	}
	append(&bdev->ranges->wanted, lock);
	serve(bdev->ranges);
	return 0;
}

void bdev_unlock_range(struct bdev *bdev, struct bdev_lock *lock)
{
	range_table_free(bdev->ranges->table, lock->entry);
	serve(bdev->ranges);
}

/* --- intents of those who died -------------------------------------------------------------------------- */

static void repaired(struct bdev_io *io, int status)
{
	struct bdev_ranges *ranges = container_of(io, struct bdev_ranges, repair);

	/* What cannot be written nobody can promise any more; its initiator, who comes again, is told. */
	if (status == 0) {
		range_table_written(ranges->table, ranges->repairing, ranges->owner);
	}
	range_table_free(ranges->table, ranges->repairing);
	ranges->repairing = -1;
	serve(ranges);
}

static void repair(struct bdev_ranges *ranges)
{
	struct range_table *table = ranges->table;
	const struct range_entry *entry;
	int found;

	if (ranges->repairing >= 0 || !range_table_is_used(table) || ranges->bdev->readonly) {
		return;
	}
	found = range_table_adopt(table, ranges->owner);
	if (found < 0) {
		return;
	}
	entry = &table->entry[found];
	ranges->repairing = found;
	ranges->repair_iov = (struct iovec){table->data[found], entry->length};
	ranges->repair = (struct bdev_io){
	    .bdev = ranges->bdev,
	    .done = repaired,
	    .iov = &ranges->repair_iov,
	    .iovcnt = 1,
	    .op = BDEV_WRITE,
	    .flags = BDEV_IO_FUA | BDEV_IO_LOCKED,
	    .offset = entry->offset,
	    .length = entry->length,
	};
	bdev_submit(&ranges->repair);
}

void bdev_ranges_repair(struct bdev *bdev)
{
	if (bdev->ranges) {
		serve(bdev->ranges);
	}
}

/* --- all of it ------------------------------------------------------------------------------------------ */

/* Another look for all that wait. What they start may end at once and bring us here again: one is enough. */
static void serve(struct bdev_ranges *ranges)
{
	struct reactor *reactor = ranges->bdev->reactor;

	ranges->again = true;
	if (ranges->serving) {
		return;
	}
	ranges->serving = true;
	while (ranges->again) {
		ranges->again = false;
		repair(ranges);
		retry_wanted(ranges);
		retry_settling(ranges);
		retry_held(ranges);
	}
	ranges->serving = false;
	if (!ranges->timer.place && (ranges->held || ranges->wanted.first || ranges->settling.first) &&
	    timer_set(reactor, &ranges->timer, reactor_ticks() + reactor_ns_to_ticks(RETRY_NS))) {
		ranges_fail_waiting(ranges, -ENOMEM);
	}
}

static void fire(struct timer *timer)
{
	serve(container_of(timer, struct bdev_ranges, timer));
}

static void fail_locks(struct bdev_lock *lock, int status)
{
	for (struct bdev_lock *next; lock; lock = next) {
		next = lock->next;
		lock->granted(lock, status);
	}
}

int ranges_abort(struct bdev_ranges *ranges, struct bdev_io *io)
{
	if (!detour_unlink(&ranges->held, &ranges->held_end, io)) {
		return -ENOTSUP;
	}
	bdev_complete(io, -ECANCELED);
	return 0;
}

void ranges_fail_waiting(struct bdev_ranges *ranges, int status)
{
	struct bdev_io *io = ranges->held;

	ranges->held = NULL;
	ranges->held_end = &ranges->held;
	for (struct bdev_io *next; io; io = next) {
		next = io->next;
		bdev_complete(io, status);
	}
	for (struct bdev_lock *lock = ranges->settling.first; lock; lock = lock->next) {
		range_table_free(ranges->table, lock->entry);
	}
	fail_locks(take_all(&ranges->settling), status);
	fail_locks(take_all(&ranges->wanted), status);
}

void ranges_free(struct bdev_ranges *ranges)
{
	if (ranges) {
		timer_clear(ranges->bdev->reactor, &ranges->timer);
		range_table_unmap(ranges->table);
		free(ranges);
	}
}

int bdev_set_ranges(struct bdev *bdev, int fd, uint32_t owner)
{
	struct bdev_ranges *ranges;

	if (bdev->ranges) {
		return -EEXIST;
	}
	if (owner >= RANGE_OWNERS) {
		return -ERANGE;
	}
	ranges = calloc(1, sizeof(*ranges));
	if (!ranges) {
		return -ENOMEM;
	}
	ranges->table = range_table_map(fd);
	if (!ranges->table) {
		int error = errno;

		free(ranges);
		return -error;
	}
	ranges->bdev = bdev;
	ranges->owner = owner;
	ranges->writers = ranges->table->owner[owner].writers;
	ranges->held_end = &ranges->held;
	ranges->timer.fire = fire;
	ranges->repairing = -1;
	take_all(&ranges->wanted);
	take_all(&ranges->settling);
	range_table_join(ranges->table, owner);
	barrier_register();
	ranges_count(ranges, BEFORE, (int)bdev->in_flight);
	bdev->ranges = ranges;
	bdev->epoch |= BDEV_MARK_COUNTED;
	detour_update(bdev);
	serve(ranges);
	return 0;
}
