/* A block device on another one that holds ciphertext only: AES-XTS (IEEE 1619), a block of the device at a
 * time. */
#ifndef BDEV_CRYPTO_H
#define BDEV_CRYPTO_H

#include "bdev/bdev.h"

/* cffi: begin */
/* @key_fd, see crypto_key_read(), stays the caller's. NULL and errno on failure. */
struct bdev *crypto_bdev_open(uint64_t id, uint32_t slot, uint64_t block_count, struct bdev *base, int key_fd);
/* cffi: end */

#endif
