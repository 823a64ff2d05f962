/*
 * How clusters get into the overlay of a copy-on-write disk.
 *
 *	claimed -> data written -> flushed -> READY -> block of the map written -> bit set, claim over
 *
 * The order is what a crash cannot break. The data of a cluster are durable before its bit is anywhere on the
 * overlay: after a power failure a bit never stands for data that were lost. The bit is on the overlay before
 * anybody relies on it, and before the request that brought the cluster there completes: a reactor or the
 * whole cluster that is killed loses nothing that was answered. If it dies in between, the base still has the
 * cluster, and what was half written is written again.
 *
 * Flushes are shared: whatever was written while one commit was under way is in the next.
 */
#ifndef BDEV_COW_COPY_H
#define BDEV_COW_COPY_H

#include "bdev/cow.h"
#include "bdev/stacked.h"

#define COW_COPIES 32 /* under way at a time, of one handle */

enum cow_phase {
	COW_ENSURE, /* clusters are being brought to the overlay */
	COW_READ,
	COW_FORWARD,
};

/* How far a request has come; it stands in io->scratch. */
struct cow_progress {
	uint64_t next; /* READ: bytes, ENSURE: clusters, that are dealt with */
	int32_t status;
	uint32_t pending : 28; /* what it waits for, and 1 while more may be started */
	uint32_t phase : 3;    /* enum cow_phase */
	uint32_t
	    forward : 1; /* ENSURE: something was there already, so the request itself is still to be done */
};

struct cow_list {
	struct bdev_io *first, **end;
};

/* One cluster on its way, or several that become zeroes. */
struct cow_copy {
	struct bdev_io io; /* the step that is under way */
	struct iovec iov;
	struct cow_bdev *cow;
	struct cow_copy *next;
	struct bdev_io *request; /* whose data go in, and which waits; NULL: for a fill */
	struct cow_list waiting; /* other requests that want the same cluster */
	uint64_t first;		 /* clusters */
	uint64_t count;		 /* 0: the copy is free */
	uint64_t offset, length; /* bytes of the disk */
	uint8_t *buffer;	 /* a cluster */
};

struct cow_fill {
	uint64_t id; /* of the notice */
	uint64_t next, end;
	uint32_t pending;
	int status;
	bool active;
};

struct cow_bdev {
	struct stacked stacked;
	struct bdev *base, *overlay;
	struct cow_map *map;
	size_t map_size;
	uint64_t base_size;
	unsigned cluster_shift;
	uint16_t owner;
	bool copy_on_read;
	struct cow_fill fill;

	struct cow_copy copies[COW_COPIES];
	uint8_t *buffers;
	struct cow_copy *free;
	unsigned free_count;
	struct cow_list starving;  /* for a copy */
	struct cow_list contended; /* for a cluster that another reactor has claimed */
	struct cow_list resumable; /* at the end of the turn */
	struct timer retry;
	struct deferred work;

	struct cow_copy *written;    /* for the next commit */
	struct cow_copy *committing; /* READY, unless their flush is under way */
	struct bdev_io commit;	     /* the flush, or the block that is being written */
	struct iovec commit_iov;
	struct bitmap_block *image;
	uint64_t block; /* that we hold the lock of, while it is written */
	bool blocked;	/* another reactor holds it */
};

int cow_copies_init(struct cow_bdev *cow);
void cow_copies_free(struct cow_bdev *cow);

enum cow_start {
	COW_STARTED,
	COW_THERE,  /* by now */
	COW_WAITS,  /* cow_resume() follows */
	COW_FAILED, /* for want of memory */
};

/*
 * Begin to bring @cluster to the overlay for @io, whose pending counts one more, and with it as many as *@count
 * that follow where all of them become zeroes. *@count: how many were begun with.
 */
enum cow_start cow_copy_start(struct cow_bdev *cow, struct bdev_io *io, uint64_t cluster, uint64_t *count);

/* A copy out of the pool, which is not dry, of a cluster that we have claimed; @io: NULL for a fill. */
struct cow_copy *cow_copy_take(struct cow_bdev *cow, uint64_t cluster, struct bdev_io *io);
/* Begin with it. */
void cow_copy_run(struct cow_copy *copy);
/* It is over, and its claims are. */
void cow_copy_end(struct cow_copy *copy, int status);
/* Give up its claims, and end it. */
void cow_copy_fail(struct cow_copy *copy, int status);
/* Have what waits looked at, at the end of this turn. */
void cow_defer(struct cow_bdev *cow);
/* The same a little later, for what another reactor holds, which may die meanwhile. False: no memory. */
bool cow_look_again(struct cow_bdev *cow);

/* In cow_commit.c, once a turn: commit what has been written, or go on with that. */
void cow_commit(struct cow_bdev *cow);
/* In cow_fill.c, once a turn: begin as many copies as leave half of them to requests. */
void cow_fill(struct cow_bdev *cow);

/* In cow.c. Go on with a request that waited. */
void cow_resume(struct bdev *bdev, struct bdev_io *io);
/* One thing less that a request waits for. */
void cow_ended(struct bdev *bdev, struct bdev_io *io, int status);

static inline struct cow_progress *cow_progress_of(struct bdev_io *io)
{
	return (struct cow_progress *)io->scratch;
}

_Static_assert(sizeof(struct cow_progress) <= sizeof(((struct bdev_io *)0)->scratch), "progress fits");

#endif
