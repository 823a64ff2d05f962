/* A block device of nothing: writes vanish, reads answer at once and leave their buffers as they are. */
#ifndef BDEV_NULL_H
#define BDEV_NULL_H

#include "bdev/bdev.h"

/* cffi: begin */
/* NULL and errno on failure. */
struct bdev *null_bdev_open(struct reactor *reactor, uint64_t id, uint32_t slot, uint32_t block_size,
			    uint64_t block_count);
/* cffi: end */

#endif
