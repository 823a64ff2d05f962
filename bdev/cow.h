/* A block device that reads from a base, and keeps in an overlay what is written to it. */
#ifndef BDEV_COW_H
#define BDEV_COW_H

#include "bdev/bdev.h"
#include "bdev/cow_map.h"

/* cffi: begin */
struct cow_setup {
	struct bdev *base;    /* only read */
	struct bdev *overlay; /* all of it is ours; its block size is the base's */
	uint64_t base_blocks; /* the rest of the disk reads as zeroes */
	uint64_t block_count;
	uint16_t owner; /* of claims: 1 to 0x7fff, another one in every reactor */
	bool copy_on_read;
	int map_fd; /* of the struct cow_map; stays the caller's */
};

/* NULL and errno on failure. */
struct bdev *cow_bdev_open(uint64_t id, uint32_t slot, const struct cow_setup *setup);
/*
 * Bring what the base has of clusters @first to @end - 1 to the overlay, but for those that are there or on
 * their way. NOTICE_DRAINED from @id follows, with -errno of the first failure as its code. 0; -EBUSY while
 * another such call is under way here, -ENODEV when the handle was removed.
 */
int cow_fill_start(struct bdev *bdev, uint64_t id, uint64_t first, uint64_t end);
/* cffi: end */

#endif
