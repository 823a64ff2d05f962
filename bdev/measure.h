/* How long an open device takes for requests, with nothing in between: for benchmarks. */
#ifndef BDEV_MEASURE_H
#define BDEV_MEASURE_H

#include "bdev/bdev.h"

/* cffi: begin */
struct bdev_measure {
	uint32_t op;	  /* READ or WRITE */
	uint32_t depth;	  /* submitted together, before any is waited for; 1 to 128 */
	uint64_t length;  /* bytes of each */
	uint64_t batches; /* of so many */
};

/*
 * Carry out requests one after another through the device, from its beginning on and again, turning the poll
 * loop where they do not end at once. Returns the ticks that it took, or 0 and -errno in @error.
 */
uint64_t bdev_measure(struct bdev *bdev, const struct bdev_measure *setup, int *error);
/* cffi: end */

#endif
