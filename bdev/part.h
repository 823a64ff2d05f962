/* A block device that is a part of another one. */
#ifndef BDEV_PART_H
#define BDEV_PART_H

#include "bdev/bdev.h"

/* cffi: begin */
/* Blocks @first_block to @first_block + @block_count - 1 of @base. NULL and errno on failure. */
struct bdev *part_bdev_open(uint64_t id, uint32_t slot, uint64_t first_block, uint64_t block_count,
			    struct bdev *base);
/* cffi: end */

#endif
