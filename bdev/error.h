/* A block device on another one that fails, withholds or corrupts requests, as it is told. */
#ifndef BDEV_ERROR_H
#define BDEV_ERROR_H

#include "bdev/bdev.h"

/* cffi: begin */
enum error_type {
	ERROR_NONE,
	ERROR_FAILURE, /* fails with -EIO and does not reach the base */
	ERROR_PENDING, /* is withheld until error_bdev_resume(), a RESET, or removal */
	ERROR_CORRUPT, /* one byte of its data is changed on its way */
	ERROR_NOMEM,   /* finds no resources, and is tried again a little later */
};

#define ERROR_NO_END 0xffffffffffffffff /* left: as often as there are requests */

/* What happens to one kind of operation. */
struct error_rule {
	uint32_t type; /* enum error_type; written last, after ERROR_NONE */
	uint32_t rate; /* of 2^32 requests so many are hit; 0: all */
	uint64_t left; /* requests still to be hit: reactors count it down together */
	uint64_t corrupt_offset;
	uint32_t corrupt_value; /* XORed to the byte there */
	uint32_t queue_depth;	/* only while so many are in flight, or more */
};

/* In memory that the control process, who writes it, shares with every reactor. */
struct error_rules {
	struct error_rule rule[6]; /* by enum bdev_op */
};

/* @fd: of the rules; stays the caller's. @seed: of chance. NULL and errno on failure. */
struct bdev *error_bdev_open(uint64_t id, uint32_t slot, uint64_t block_count, struct bdev *base, int fd,
			     uint32_t seed);
/* Let go of what is withheld: it is carried out. */
void error_bdev_resume(struct bdev *bdev);
/* cffi: end */

#endif
