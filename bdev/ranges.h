/*
 * Ranges of a device that one request has for itself, in all reactors: what a comparison and the write that
 * follows it are made one with. While a range is locked nothing changes it but what its holder submits; who
 * only reads is not held up.
 *
 * Whoever locks first puts the range into the table, and then waits until all that had begun to change
 * anything, on any reactor, has ended. Whoever writes first counts itself, and then looks at the table. So one
 * of the two sees the other, given a barrier on each side between the two steps; the one who locks pays for
 * both (reactor/barrier.h). Writers count by the epoch of the table, which those who wait flip, so that their
 * wait ends although others go on writing elsewhere.
 *
 * A write ends by storing its count with release semantics, which who locks loads with acquire semantics: all
 * that the write has stored comes before. An unlocked range is the same the other way round, by table->used.
 *
 * Most of the time nothing is locked: a write counts itself and finds that out in a few instructions of
 * bdev_submit(). While anything is locked, wherever, it makes the detour by which it may have to wait.
 */
#ifndef BDEV_RANGES_H
#define BDEV_RANGES_H

#include "bdev/bdev.h"
#include "bdev/detour.h"
#include "bdev/range_table.h"
#include "reactor/barrier.h"

/* cffi: begin */
/*
 * Let requests on an open handle mind the ranges that are locked, from now on and until it is closed. @fd: of a
 * struct range_table, stays the caller's. @owner: the number of this reactor. 0 or -errno.
 */
int bdev_set_ranges(struct bdev *bdev, int fd, uint32_t owner);
/* There may be intents of a reactor that has died: write them. */
void bdev_ranges_repair(struct bdev *bdev);
/* cffi: end */

/* What looks out for locked ranges; all else passes. COMPARE_AND_WRITE locks its range itself. */
#define RANGE_WRITERS (1U << BDEV_WRITE | 1U << BDEV_UNMAP | 1U << BDEV_WRITE_ZEROES | 1U << BDEV_COPY)

/* A range that somebody wants. The memory is the caller's, from bdev_lock_range() to bdev_unlock_range(). */
struct bdev_lock {
	/* Once, before bdev_lock_range() returns or later: it is ours (0), or will not be (-ENODEV). */
	void (*granted)(struct bdev_lock *lock, int status);
	uint64_t offset; /* bytes */
	uint64_t length;
	int entry; /* of the table */
	struct bdev_lock *next;
	uint64_t busy[3][RANGE_OWNERS / 64]; /* writers that were not seen to be idle since */
};

struct bdev_locks {
	struct bdev_lock *first, **end;
};

/* Of an open handle; but for the first two it is ranges.c's own affair. */
struct bdev_ranges {
	struct range_table *table;
	uint64_t *writers; /* ours, in the table: struct range_owner */
	uint32_t owner;
	bool serving, again;
	struct bdev *bdev;
	struct bdev_locks wanted;   /* not in the table yet */
	struct bdev_locks settling; /* in the table, while others end what they had begun */
	struct bdev_io *held, **held_end;
	struct timer timer;
	struct bdev_io repair; /* writes an intent that was adopted */
	struct iovec repair_iov;
	int repairing; /* the entry, or -1 */
};

static inline void ranges_count(struct bdev_ranges *ranges, size_t which, int change)
{
	uint64_t *writers = &ranges->writers[which];

	__atomic_store_n(writers, __atomic_load_n(writers, __ATOMIC_RELAXED) + change, __ATOMIC_RELEASE);
}

/* One that changes data begins: by which counter. After this, and not before, it looks at what is locked. */
static inline size_t ranges_count_writer(struct bdev_ranges *ranges)
{
	size_t odd = __atomic_load_n(&ranges->table->epoch, __ATOMIC_RELAXED) & 1;

	ranges_count(ranges, odd, 1);
	barrier_here();
	return odd;
}

static inline uint8_t ranges_marks(size_t odd)
{
	return (uint8_t)(BDEV_MARK_WRITER + odd * BDEV_MARK_ODD);
}

/*
 * One of RANGE_WRITERS begins: what marks it, for ranges_leave(); or 0, and it does not, where something is
 * locked. So BDEV_IO_LOCKED needs no look here: its lock is in the table.
 */
static inline uint8_t ranges_enter(struct bdev_ranges *ranges)
{
	size_t odd = ranges_count_writer(ranges);

	if (__builtin_expect(range_table_is_used(ranges->table), 0)) {
		ranges_count(ranges, odd, -1);
		return 0;
	}
	return ranges_marks(odd);
}

/* The end of one that is so marked. */
static inline void ranges_leave(struct bdev_ranges *ranges, const struct bdev_io *io)
{
	ranges_count(ranges, io->epoch / BDEV_MARK_ODD & 1, -1);
}

/* -EOPNOTSUPP, and nothing happens, where bdev_set_ranges() was not called. */
int bdev_lock_range(struct bdev *bdev, struct bdev_lock *lock);
void bdev_unlock_range(struct bdev *bdev, struct bdev_lock *lock);

/* For bdev/detour.c: detour_past_ranges() follows when @io may go on; and the end of any request. */
void ranges_submit(struct bdev_ranges *ranges, struct bdev_io *io);
void ranges_end(struct bdev_ranges *ranges, struct bdev_io *io);
/* For bdev.c. */
/* End one that waits, with -ECANCELED: 0, or -ENOTSUP if it does not wait. */
int ranges_abort(struct bdev_ranges *ranges, struct bdev_io *io);
void ranges_fail_waiting(struct bdev_ranges *ranges, int status);
void ranges_free(struct bdev_ranges *ranges);

#endif
