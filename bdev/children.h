/*
 * Requests on behalf of a request: on a base, or of a part of it. They are drawn from a pool that is made with
 * the handle whose requests their parents are; a parent that finds it dry waits in line, and the next child
 * that comes back serves it.
 */
#ifndef BDEV_CHILDREN_H
#define BDEV_CHILDREN_H

#include "bdev/bdev.h"

#define CHILDREN 1024		 /* of one pool, under way at a time */
#define CHILDREN_WITH_IOVECS 128 /* the same, where each has memory for iovecs */
#define CHILD_IOVECS 1024	 /* as many as a request of a queue has */

struct children;

struct child_io {
	struct bdev_io io;
	union {
		struct bdev_io *parent;
		struct child_io *next; /* in the pool, in which no request is anybody's parent */
	};
	struct children *pool;
	uint32_t tag;	    /* its user's own */
	struct iovec iov[]; /* of a pool made with iovecs */
};

struct children {
	/* Go on with a request on @bdev that waited for the pool. */
	void (*resume)(struct bdev *bdev, struct bdev_io *parent);
	/* A child has ended, and is back in the pool; completes @parent unless set. Set before one is taken. */
	void (*ended)(struct bdev *bdev, struct bdev_io *parent, int status);
	struct bdev *bdev; /* whose requests the parents are */
	const struct child_io
	    *last;	       /* for ended(): which child it was; it is as it was until the next is taken */
	struct child_io *free; /* used before, the last one first: its memory is in the cache */
	struct bdev_io *waiting, **waiting_end; /* for the pool, oldest first */
	bool serving;				/* those that wait */
	uint8_t *memory;
	size_t stride;
	uint32_t used; /* ever: those after were never touched */
	uint32_t size;
};

/* 0, or -errno and nothing was made. */
int children_init(struct children *children, struct bdev *bdev, bool iovecs,
		  void (*resume)(struct bdev *bdev, struct bdev_io *parent));
void children_free(struct children *children);

/* Behind children_take(): one that was never used, or NULL, and @parent waits. */
struct child_io *children_take_new(struct children *children, struct bdev_io *parent);

/*
 * A child of @parent, with its operation and iovcnt; NULL when the pool is dry, and then resume() follows
 * later. The caller fills in bdev, range and iov, and submits it.
 */
static inline struct child_io *children_take(struct children *children, struct bdev_io *parent)
{
	struct child_io *child = children->free;

	if (__builtin_expect(child != NULL, 1)) {
		children->free = child->next;
	} else {
		child = children_take_new(children, parent);
		if (__builtin_expect(!child, 0)) {
			return NULL;
		}
	}
	child->parent = parent;
	/* One by one: a load of all that was stored so a moment ago would have to wait for the stores. */
	child->io.iovcnt = parent->iovcnt;
	child->io.op = parent->op;
	child->io.flags = parent->flags & (BDEV_IO_FUA | BDEV_IO_UNMAP);
	return child;
}

/*
 * Have @child, of a pool with iovecs, move up to @length bytes of its parent from byte @skip on, in @iovecs
 * buffers at most: fills in iov, iovcnt and length, which is whole blocks; 0 if not even one fits.
 */
void child_slice(struct child_io *child, uint64_t skip, uint64_t length, uint32_t iovecs);

/* Ask for the end of all children of @parent: 0 if one of them will, or -ENOTSUP. */
int children_abort(struct children *children, const struct bdev_io *parent);

#endif
