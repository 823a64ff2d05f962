/*
 * Requests that are carried out by way of buffers of our own: because somebody else has to reach the data
 * (another process), or must not see what becomes of it (ciphertext). A request takes a slot, which has one
 * buffer, and keeps it until it ends; one that finds none waits in line. The device sets limits
 * (bounce_limit()), so that none has more data than a buffer holds.
 */
#ifndef BDEV_BOUNCE_H
#define BDEV_BOUNCE_H

#include "bdev/divide.h"

struct bounce_slot {
	struct bdev_io *io; /* NULL: nobody's, or abandoned */
	uint8_t *buffer;
	struct bounce_slot *next; /* free ones, the one used last first: its memory is in the cache */
	uint32_t index;
};

struct bounce {
	/* Carry out the request of @slot: bounce_done() follows, before this returns or later. */
	void (*start)(struct bounce *bounce, struct bounce_slot *slot);
	struct bounce_slot *slots;
	struct bounce_slot *free;
	struct bdev_io *waiting, **waiting_end; /* for a slot, oldest first */
	uint32_t count;
	uint32_t size;	    /* bytes of a buffer */
	uint32_t with_data; /* 1 << enum bdev_op: those that go through the buffer */
	bool untouched;	    /* the device itself fills the buffer of a WRITE and empties that of a READ */
	bool suspended;	    /* everything waits */
	bool serving;	    /* those that wait */
};

/*
 * @count slots with buffers of @size bytes one after the other from @memory, which stays the caller's; NULL:
 * there is none yet, and everything waits for bounce_resume(). READ and WRITE have data; with @zeroes,
 * WRITE_ZEROES writes a buffer of them. 0 or -ENOMEM.
 */
int bounce_init(struct bounce *bounce, uint8_t *memory, uint32_t count, uint32_t size, bool zeroes,
		void (*start)(struct bounce *bounce, struct bounce_slot *slot));
void bounce_free(struct bounce *bounce);

/* bdev_set_limits() of the device whose requests go this way: those of the buffers, and others of its own. */
int bounce_limit(const struct bounce *bounce, struct bdev *bdev, struct bdev_limits limits);

/* Carry out any request but a RESET; ends in bdev_complete(). */
void bounce_submit(struct bounce *bounce, struct bdev_io *io);
/* The request has ended; what a READ has put into the buffer goes to the caller. */
void bounce_done(struct bounce *bounce, struct bounce_slot *slot, int status);

/* Whether the data of @io goes through the buffer. */
static inline bool bounce_has_data(const struct bounce *bounce, const struct bdev_io *io)
{
	return bounce->with_data & 1U << io->op;
}

/* End a request that waits: 0, or -ENOTSUP if it does not, and nothing happens. */
int bounce_abort(struct bounce *bounce, struct bdev_io *io);
/* End the request of @slot, which somebody may still be using: nobody gets it until bounce_recover(). */
void bounce_abandon(struct bounce *bounce, struct bounce_slot *slot, int status);
void bounce_recover(struct bounce *bounce, struct bounce_slot *slot);
/*
 * Have every request wait, those in slots too, which begin anew; whoever was using the slots does so no more.
 * Then go on, with buffers in other memory.
 */
void bounce_suspend(struct bounce *bounce);
void bounce_resume(struct bounce *bounce, uint8_t *memory);
/* End those that wait and were submitted (ticks) before @limit. Returns when the oldest left was, or 0. */
uint64_t bounce_fail_waiting(struct bounce *bounce, uint64_t limit, int status);

#endif
