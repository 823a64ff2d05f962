/*
 * What a device takes in one request, and the requests that are more: these are divided here, for every kind,
 * and their parts are under way together. A request within the limits pays two compares in bdev_submit(),
 * and one on a device without any.
 *
 * Alignment of memory is no limit: a device that cannot reach some memory has buffers of its own.
 */
#ifndef BDEV_DIVIDE_H
#define BDEV_DIVIDE_H

#include "bdev/bdev.h"

/* cffi: begin */
/* Of each, 0: no limit. What counts bytes is a multiple of the block size. */
struct bdev_limits {
	uint64_t bytes[10]; /* the most of one request, by enum bdev_op */
	uint64_t
	    boundary; /* a power of two: READ, WRITE and COMPARE do not cross a multiple of it, see room() */
	uint32_t segments; /* buffers of a READ, WRITE or COMPARE */
	uint32_t
	    unmap_unit; /* a power of two: UNMAP reaches the device in whole ones; what is around them stays */
};

/* Before the first request: 0, -EINVAL, or -ENOMEM, and nothing happens. */
int bdev_set_limits(struct bdev *bdev, const struct bdev_limits *limits);
/* cffi: end */

/* For detour.c: whether a request, which has passed all checks, is within the limits. */
bool divider_allows(const struct bdev_divider *divider, const struct bdev_io *io);
/* Have the device carry out one that is not: a bdev_complete() follows. */
void divide(struct bdev_io *io);
/* bdev_abort() of one of these. */
int divide_abort(struct bdev_divider *divider, struct bdev_io *io);
/* Operations of which it looks at every request: 1 << enum bdev_op. */
uint32_t divider_looks_at(const struct bdev_divider *divider);
/* With the handle. May be NULL. */
void divider_free(struct bdev_divider *divider);

#endif
