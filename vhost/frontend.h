/*
 * The driver's side of a split virtqueue (virtio 1.2, section 2.7): what a guest's kernel does, for the
 * user-space front-end. It lives in shared memory that a back-end serves; see frontend.py for how the
 * two are introduced, and workload.h for the load generator that drives a queue at full speed.
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
 * Drive the ring whose three areas (size * 16, 6 + size * 2 and 6 + size * 8 bytes, zeroed or left by
 * an earlier session) are mapped at these addresses. The eventfds stay the caller's. NULL and errno:
 * -EINVAL when @size is no power of two or larger than VQ_MAX_SIZE.
 */
struct front_queue *front_queue_create(void *desc, void *avail, void *used, uint32_t size, bool event_idx,
				       int kick_fd, int call_fd);
void front_queue_destroy(struct front_queue *queue);

/*
 * Put a chain into the avail ring without publishing it; returns its head, -ENOSPC when there are too few
 * free descriptors, or -EINVAL without buffers. With @table (mapped memory of count * 16 bytes at the
 * guest-physical @table_addr) the chain is written there and takes one descriptor (section 2.7.5.3).
 */
int front_queue_add(struct front_queue *queue, const struct front_buffer *buffers, uint32_t count, void *table,
		    uint64_t table_addr);
/*
 * Put any head into the avail ring, even one that means nothing: for tests of back-ends, which write the
 * descriptors themselves. What comes back is reaped as usual.
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
uint16_t front_queue_avail_idx(const struct front_queue *queue);
uint16_t front_queue_used_idx(const struct front_queue *queue); /* seen by us */
/* Forget what the device has: every descriptor is free again. */
void front_queue_reset(struct front_queue *queue);
/* cffi: end */

/* In front_queue.chains, beside numbers of descriptors. */
#define FRONT_NO_CHAIN 0       /* the device does not have this head */
#define FRONT_RAW_CHAIN 0xffff /* it has, by front_queue_add_head() */

struct front_queue {
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	uint16_t size;
	uint16_t mask;
	uint16_t avail_idx; /* next entry of the avail ring to fill */
	uint16_t published; /* avail->idx as the device sees it */
	uint16_t used_idx;  /* next entry of the used ring to look at */
	uint16_t free_head;
	uint16_t free_count;
	uint16_t pending;
	bool event_idx;
	int kick_fd;
	int call_fd;
	uint64_t kicks;
	uint16_t *next;	  /* private copy of how descriptors are linked, free or in use */
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

/* How many chains came back that were not looked at. */
static inline uint16_t front_queue_ready(const struct front_queue *queue)
{
	return (uint16_t)(front_load_acquire(&queue->used->idx) - queue->used_idx);
}

/* Ask for a signal, or for none. After asking, look at the used ring once more before sleeping. */
void front_queue_want_call(struct front_queue *queue, bool want);
/* Empty the call eventfd. */
void front_queue_drain_call(struct front_queue *queue);

#endif
