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
 */
#ifndef BDEV_RANGES_H
#define BDEV_RANGES_H

#include "bdev/bdev.h"
#include "bdev/range_table.h"

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

/* For bdev/emulate.c: the table, and which owner we are. */
struct range_table *ranges_table(const struct bdev_ranges *ranges);
uint32_t ranges_owner(const struct bdev_ranges *ranges);

#endif
