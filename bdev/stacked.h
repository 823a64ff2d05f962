/*
 * What devices that stand on other devices have in common: their bases, and requests on these on behalf of
 * their own (bdev/children.h). The handles of the bases are the process's own and outlive ours.
 */
#ifndef BDEV_STACKED_H
#define BDEV_STACKED_H

#include "bdev/bdev.h"
#include "bdev/children.h"

struct stacked {
	struct bdev bdev; /* first */
	/*
	 * Requests on bases. A kind may set resume(), which is submit() else, and ended(), which completes the
	 * request else.
	 */
	struct children children;
	struct bdev *base; /* the first: a load less on the way there than bases[0] */
	uint32_t base_count;
	struct bdev **bases;
};

/* What handles of all stacked kinds are made with. */
struct stacked_setup {
	struct reactor *reactor;
	const struct bdev_ops *ops; /* close: stacked_close, or something that calls it */
	uint64_t id;
	uint32_t slot;
	uint32_t block_size;
	uint64_t block_count;
	struct bdev **bases; /* copied */
	uint32_t base_count;
	bool pieces; /* child_slice() is used */
};

/*
 * Make a handle of @size bytes that begin with a struct stacked, the rest zeroed. It supports what all bases
 * support, and is read-only if one is. NULL and errno.
 */
void *stacked_create(size_t size, const struct stacked_setup *setup);
/* The same for a device on one base, with its block size. */
void *stacked_over(size_t size, struct bdev *base, const struct bdev_ops *ops, uint64_t id, uint32_t slot,
		   uint64_t block_count);
/* Free what they made. */
void stacked_close(struct bdev *bdev);

/* abort() of devices that end a request when its bases have: each of them is asked. */
int stacked_abort(struct bdev *bdev, struct bdev_io *io);
/* extent() of devices on one base whose blocks are where ours are. */
int stacked_extent(struct bdev *bdev, uint64_t offset, uint64_t *length);

/* Carry out @io on @base, as it is but for its offset. */
void stacked_forward(struct stacked *stacked, struct bdev_io *io, struct bdev *base, uint64_t offset);

#endif
