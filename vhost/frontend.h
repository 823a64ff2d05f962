/*
 * The driver's side of a virtqueue, split (virtio 1.2, section 2.7) or packed (section 2.8): what a guest's
 * kernel does, for the user-space front-end. It lives in shared memory that a back-end serves; see frontend.py
 * for how the two are introduced, and workload.h for the load generator that drives a queue at full speed.
 *
 * A chain that the device has is known by its head: of a split ring the number of its first descriptor, of
 * a packed one the identifier that we gave it, which is below the ring's size, too.
 *
 * A queue belongs to one thread at a time. The back-end is not trusted: what it writes to the used ring is
 * checked, and the free list stands in private memory.
 */
#ifndef VHOST_FRONTEND_H
#define VHOST_FRONTEND_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "vhost/virtqueue.h"

/* cffi: begin */
/* One buffer of a chain, in guest-physical addresses. */
struct front_buffer {
	uint64_t addr;
	uint32_t len;
	uint32_t device_writes; /* 0: the device reads it */
};

/* A chain that came back. */
struct front_used {
	uint32_t head;
	uint32_t written; /* bytes, as the device says */
};

struct front_queue;

/*
 * Drive the ring whose three areas are mapped at these addresses: of a split ring size * 16, 6 + size * 2 and
 * 6 + size * 8 bytes, zeroed or left by an earlier session; of a packed one size * 16, 4 (the driver's event
 * suppression) and 4 bytes (the device's), zeroed. The eventfds stay the caller's. NULL and errno: EINVAL
 * when @size is larger than VQ_MAX_SIZE, or no power of two and the ring is split.
 */
struct front_queue *front_queue_create(void *desc, void *avail, void *used, uint32_t size, bool event_idx,
				       bool packed, int kick_fd, int call_fd);
void front_queue_destroy(struct front_queue *queue);

/*
 * Make a chain available without publishing it; returns its head, -ENOSPC when there are too few
 * free descriptors, or -EINVAL without buffers. With @table (mapped memory of count * 16 bytes at the
 * guest-physical @table_addr) the chain is written there and takes one descriptor (2.7.5.3, 2.8.7).
 */
int front_queue_add(struct front_queue *queue, const struct front_buffer *buffers, uint32_t count, void *table,
		    uint64_t table_addr);
/*
 * Put any head into the avail ring of a split ring, even one that means nothing: for tests of back-ends, which
 * write the descriptors themselves. What comes back is reaped as usual.
 */
void front_queue_add_head(struct front_queue *queue, uint16_t head);
/* Publish what was added and kick if the device asks for it. 0, or -errno of the kick. */
int front_queue_publish(struct front_queue *queue);
/* Kick without asking. 0 or -errno. */
int front_queue_kick(struct front_queue *queue);
/*
 * Take chains that came back, at most @max. Returns how many, or -EPROTO when the device returns a head
 * that it does not have, or moves its index further than there are chains.
 */
int front_queue_reap(struct front_queue *queue, struct front_used *used, uint32_t max);
/*
 * Wait until something comes back: poll for @spin_ns, then ask for a signal and sleep. Returns 1, 0 after
 * @timeout_ns, or -errno; -EINTR lets the caller look at its signals.
 */
int front_queue_wait(struct front_queue *queue, uint64_t timeout_ns, uint64_t spin_ns);

uint32_t front_queue_free(const struct front_queue *queue);    /* descriptors */
uint32_t front_queue_pending(const struct front_queue *queue); /* chains that the device has */
uint64_t front_queue_kicks(const struct front_queue *queue);   /* kicks sent */
/* Forget what the device has: every descriptor is free again. */
void front_queue_reset(struct front_queue *queue);
/* cffi: end */

/* In front_queue.chains, beside numbers of descriptors; the second only of split rings. */
#define FRONT_NO_CHAIN 0       /* the device does not have this head */
#define FRONT_RAW_CHAIN 0xffff /* it has, by front_queue_add_head() */

struct front_queue {
	union {
		struct {
			struct vring_desc *desc;
			struct vring_avail *avail;
			struct vring_used *used;
		};
		struct {
			struct vring_packed_desc *ring;
			struct vring_packed_event *driver_event;
			struct vring_packed_event *device_event;
		};
	};
	uint16_t size;
	uint16_t mask;	     /* split: size - 1 */
	uint16_t avail_idx;  /* next entry of the avail ring, or next descriptor of a packed ring, to fill */
	uint16_t published;  /* split: avail->idx as the device sees it */
	uint16_t used_idx;   /* next entry of the used ring, or next descriptor of a packed ring, to look at */
	uint16_t free_head;  /* split: of descriptors; packed: of identifiers */
	uint16_t free_count; /* descriptors */
	uint16_t pending;
	uint16_t added;	     /* packed: descriptors that are not published */
	uint16_t held_place; /* packed: the first of them, whose flags publish them all */
	uint16_t held_flags;
	bool avail_wrap;
	bool used_wrap;
	bool packed;
	bool event_idx;
	int kick_fd;
	int call_fd;
	uint64_t kicks;
	uint16_t *next;	  /* split: private copy of how descriptors are linked; packed: the free identifiers */
	uint16_t *chains; /* by head: how many descriptors the device has, or FRONT_NO_CHAIN */
};

static inline uint16_t front_load_acquire(const uint16_t *shared)
{
	return __atomic_load_n(shared, __ATOMIC_ACQUIRE);
}

static inline void front_store_release(uint16_t *shared, uint16_t value)
{
	__atomic_store_n(shared, value, __ATOMIC_RELEASE);
}

/* Where the driver says which used index shall be signalled (section 2.7.7). */
static inline uint16_t *front_used_event(const struct front_queue *queue)
{
	return &queue->avail->ring[queue->size];
}

/* Where the device says which avail index shall be kicked (section 2.7.10). */
static inline const uint16_t *front_avail_event(const struct front_queue *queue)
{
	return (const uint16_t *)&queue->used->ring[queue->size];
}

/* --- packed rings ------------------------------------------------------------------------------------ */

static inline void front_packed_advance(const struct front_queue *queue, uint16_t *place, bool *wrap,
					uint16_t count)
{
	uint32_t next = (uint32_t)*place + count;

	if (next >= queue->size) {
		next -= queue->size;
		*wrap = !*wrap;
	}
	*place = (uint16_t)next;
}

/*
 * Write the next descriptor, for which there is room. Only the first one since the last front_queue_publish()
 * lacks its flags, and the device looks no further until it has them.
 */
static inline void front_packed_put(struct front_queue *queue, uint64_t addr, uint32_t len, uint16_t id,
				    uint16_t flags)
{
	struct vring_packed_desc *desc = &queue->ring[queue->avail_idx];

	flags |= queue->avail_wrap ? VRING_PACKED_AVAIL : VRING_PACKED_USED; /* section 2.8.1 */
	desc->addr = addr;
	desc->len = len;
	desc->id = id;
	if (queue->added++ == 0) {
		queue->held_place = queue->avail_idx;
		queue->held_flags = flags;
	} else {
		__atomic_store_n(&desc->flags, flags, __ATOMIC_RELAXED);
	}
	front_packed_advance(queue, &queue->avail_idx, &queue->avail_wrap, 1);
}

static inline bool front_packed_ready(const struct front_queue *queue)
{
	uint16_t flags = front_load_acquire(&queue->ring[queue->used_idx].flags);

	return !!(flags & VRING_PACKED_AVAIL) == queue->used_wrap &&
	       !!(flags & VRING_PACKED_USED) == queue->used_wrap;
}

int front_packed_add(struct front_queue *queue, const struct front_buffer *buffers, uint32_t count, void *table,
		     uint64_t table_addr);
/* Publish what was added; whether the device asks for a kick. */
bool front_packed_publish(struct front_queue *queue);
int front_packed_reap(struct front_queue *queue, struct front_used *used, uint32_t max);
void front_packed_want_call(struct front_queue *queue, bool want);

/* --- both -------------------------------------------------------------------------------------------- */

/* How many chains came back that were not looked at; a packed ring says only whether there is one. */
static inline uint16_t front_queue_ready(const struct front_queue *queue)
{
	if (queue->packed) {
		return front_packed_ready(queue);
	}
	return (uint16_t)(front_load_acquire(&queue->used->idx) - queue->used_idx);
}

/* Ask for a signal, or for none. After asking, look at the used ring once more before sleeping. */
void front_queue_want_call(struct front_queue *queue, bool want);
/* Empty the call eventfd. */
void front_queue_drain_call(struct front_queue *queue);

#endif
