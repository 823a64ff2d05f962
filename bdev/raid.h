/* A block device made of others, one after another (concat) or in turn (raid0). */
#ifndef BDEV_RAID_H
#define BDEV_RAID_H

#include "bdev/bdev.h"

/* cffi: begin */
struct raid_setup {
	uint32_t base_count;
	uint32_t strip_blocks;	     /* raid0: a power of two; 0: concat */
	struct bdev **bases;	     /* copied */
	const uint64_t *base_blocks; /* used of each, copied; raid0: all the same, whole strips */
};

/* NULL and errno on failure. */
struct bdev *raid_bdev_open(struct reactor *reactor, uint64_t id, uint32_t slot,
			    const struct raid_setup *setup);
/* cffi: end */

#endif
