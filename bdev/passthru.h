/* A block device that hands everything on to another one: the template of stacked kinds. */
#ifndef BDEV_PASSTHRU_H
#define BDEV_PASSTHRU_H

#include "bdev/bdev.h"

/* cffi: begin */
/* @base: stays open for as long as this handle. NULL and errno on failure. */
struct bdev *passthru_bdev_open(uint64_t id, uint32_t slot, uint64_t block_count, struct bdev *base);
/* cffi: end */

#endif
