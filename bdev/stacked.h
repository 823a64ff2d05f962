/*
 * What devices that stand on other devices have in common: requests on a base on behalf of a request on the
 * stacked device, drawn from a pool that is made with the handle. A request that finds the pool dry waits in
 * line; the next that comes back serves it. The handles of the bases are the process's own and outlive ours.
 */
#ifndef BDEV_STACKED_H
#define BDEV_STACKED_H

#include "bdev/bdev.h"

#define STACKED_REQUESTS 1024 /* on bases, of one handle, under way at a time */
#define STACKED_PIECES 128    /* the same, where a request is cut into pieces */
#define STACKED_IOVECS 1024   /* that a piece has at most: as many as a request of a queue */

/* A request on a base. */
struct stacked_io {
	struct bdev_io io;
	struct bdev_io *parent;
	struct stacked *stacked;
	struct stacked_io *next; /* in the pool */
	uint32_t tag;		 /* the kind's own; stacked->ended_tag for ended() */
	struct iovec iov[];	 /* of a pool made for pieces */
};

struct stacked {
	struct bdev bdev; /* first */
	/* Start a request again that waited for the pool; submit() unless set. */
	void (*resume)(struct bdev *bdev, struct bdev_io *io);
	/* A request on a base has ended, and is back in the pool; completes @parent unless set. */
	void (*ended)(struct stacked *stacked, struct bdev_io *parent, int status);
	uint32_t ended_tag;

	struct stacked_io *free; /* used before, the last one first: its memory is in the cache */
	uint8_t *pool;
	size_t pool_stride;
	uint32_t pool_used; /* ever: those after were never touched */
	uint32_t pool_size;
	struct bdev_io *waiting; /* for the pool, oldest first */
	struct bdev_io **waiting_end;
	bool serving; /* those that wait */

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
	bool pieces; /* stacked_take() with memory for iovecs, else stacked_forward() */
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
/* Only ask the bases: 0 if one of them ends what it has of @io, or -ENOTSUP. */
int stacked_abort_on_bases(struct stacked *stacked, const struct bdev_io *io);

/* Carry out @io on @base, as it is but for its offset. */
void stacked_forward(struct stacked *stacked, struct bdev_io *io, struct bdev *base, uint64_t offset);

/*
 * A request out of the pool for @io; NULL when it is dry, and then resume() follows later. The caller fills
 * in base, range, iov and iovcnt, and submits it.
 */
struct stacked_io *stacked_take(struct stacked *stacked, struct bdev_io *io);

/*
 * Have @child, of a pool made for pieces, move up to @length bytes of @io from byte @skip on: fills in iov,
 * iovcnt and length, which is whole blocks, and 0 if one block lies in more than STACKED_IOVECS buffers.
 */
void stacked_slice(struct stacked_io *child, const struct bdev_io *io, uint64_t skip, uint64_t length);

#endif
