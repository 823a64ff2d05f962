/*
 * What a device has storage for. Asking is no request: it is answered at once, and is true of a moment during
 * which nothing that changes the device is in flight.
 */
#ifndef BDEV_EXTENT_H
#define BDEV_EXTENT_H

#include "bdev/bdev.h"

/* cffi: begin */
enum bdev_extent_kind {
	BDEV_MAPPED, /* or not known */
	BDEV_HOLE,   /* reads as zeroes, which need no storage */
};

/* Does it know its holes, and does it read as zeroes where it was unmapped? If not all of it is BDEV_MAPPED. */
bool bdev_sparse(const struct bdev *bdev);
/*
 * What kind of extent is at @offset, bytes, a multiple of the block size and before the end: enum
 * bdev_extent_kind, and *@length is set to the bytes from there on that are so as well, at least a block. The
 * extent after it may be of the same kind. -errno: ENODEV (removed), ERANGE, EINVAL, EIO.
 */
int bdev_extent(struct bdev *bdev, uint64_t offset, uint64_t *length);
/* cffi: end */

/* For devices: extent() of one whose contents lie in a file, from its first byte on. */
int extent_of_file(const struct bdev *bdev, int fd, uint64_t offset, uint64_t *length);

#endif
