/* Scatter lists. */
#ifndef BDEV_IOV_H
#define BDEV_IOV_H

#include <stdint.h>

#include "bdev/bdev.h"

/*
 * Copy @length bytes between @buffer and the iovecs of @io, from their byte @skip on: into the buffer for a
 * WRITE, out of it for any other operation.
 */
void iov_copy(const struct bdev_io *io, uint64_t skip, uint8_t *buffer, uint64_t length);
/* The same into the buffer, whatever the operation. */
void iov_gather(const struct bdev_io *io, uint64_t skip, uint8_t *buffer, uint64_t length);
/* How many bytes of @buffer are as the iovecs have them, from their byte @skip on: @length if all are. */
uint64_t iov_compare(const struct bdev_io *io, uint64_t skip, const uint8_t *buffer, uint64_t length);
/* Write @length zeroes into the iovecs of @io, from their byte @skip on. */
void iov_zero(const struct bdev_io *io, uint64_t skip, uint64_t length);

#endif
