/*
 * The device's side of a virtqueue, with the in-flight log that lets another process take it over. Knows
 * nothing of what the requests mean.
 *
 * A queue has one of two formats, split (split.c) or packed (packed.c), behind the functions below. A
 * request is known by its slot, a number under the queue's size that no other request in flight has.
 *
 * Everything that the driver can write is hostile: indices, descriptors and tables are copied once, and
 * only the copy is checked and used. A driver that breaks the rules breaks its queue and nothing else.
 */
#ifndef VHOST_VIRTQUEUE_H
#define VHOST_VIRTQUEUE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "reactor/reactor.h"
#include "vhost/iotlb.h"
#include "vhost/memory.h"
#include "vhost/vring.h"

/* cffi: begin */
#define VQ_MAX_SIZE 32768    /* entries of a ring: section 2.7, and 2.8.10.1 */
#define VQ_MAX_SEGMENTS 1024 /* buffers of one chain that we accept */

/* All that is needed to serve a queue. */
struct vq_setup {
	uint64_t id;	   /* source of notices */
	uint32_t size;	   /* entries; of a split ring a power of two */
	uint32_t base;	   /* where to go on, as SET_VRING_BASE says it; ignored when @recover finds a log */
	uint64_t features; /* virtio features that were negotiated */
	uint64_t desc;	   /* addresses in the front-end's virtual address space, as SET_VRING_ADDR has them */
	uint64_t avail;
	uint64_t used;
	bool log_used;	   /* VHOST_VRING_F_LOG: log what is written into the ring itself */
	uint64_t used_log; /* guest-physical address of @used, for that */
	int kick_fd;	   /* eventfds, or -1; the queue uses duplicates of its own */
	int call_fd;	   /* non-blocking */
	int error_fd;
	int inflight_fd; /* the in-flight log */
	uint64_t inflight_offset;
	uint64_t inflight_size; /* bytes of this queue's part */
	bool recover;		/* take over from a process that is gone: what is in flight says the log */
};

/* Bytes that the in-flight log of a queue of @size entries needs, whatever its format. */
uint64_t vq_inflight_size(uint32_t size);
/* cffi: end */

/* A request as the driver wrote it: first what the device reads, then what it may write. */
struct vq_chain {
	struct iovec *iov; /* given by the caller */
	uint32_t room;	   /* iovecs that fit there */
	uint32_t readable; /* iovecs */
	uint32_t writable;
	uint64_t readable_bytes;
	uint64_t writable_bytes;
};

struct split_ring {
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	struct inflight_split *log;
	uint8_t *taken; /* by head: in flight */
	uint16_t *done; /* heads completed and not published */
	uint16_t mask;
	uint16_t next_avail;	/* next entry of the avail ring to take */
	uint16_t used_idx;	/* next entry of the used ring to fill */
	uint16_t published_idx; /* used->idx as the driver sees it */
	uint16_t signalled_idx; /* used->idx when it was last decided whether to signal */
	uint16_t batch_head;	/* the log's last_batch_head */
};

/* A descriptor taken from a packed ring; its place in the log has the same number. */
struct packed_entry {
	uint64_t addr;
	uint32_t len;
	uint16_t flags;
	uint16_t next; /* of the chain, or of the free list */
	uint16_t last; /* of the first of a chain: its last */
	uint16_t num;  /* of the first of a chain: how many */
	uint16_t id;   /* of the first of a chain: the driver's */
};

struct packed_used {
	uint32_t written;
	uint16_t slot;
};

struct packed_ring {
	struct vring_packed_desc *desc;
	struct vring_packed_event *driver_event;
	struct vring_packed_event *device_event;
	struct inflight_packed *log;
	struct packed_entry *entries;
	struct packed_used *done; /* completed and not published */
	uint16_t done_count;
	uint16_t free_head;
	uint16_t free_count;
	uint16_t next_avail;
	uint16_t used_idx;
	uint16_t signalled_idx;
	bool avail_wrap;
	bool used_wrap;
};

/* With IN_ORDER, requests that finished before an earlier one wait for it (section 2.7.9 and 2.8.7). */
struct vq_order {
	uint16_t *slots;   /* in flight, a ring of the order in which they were taken */
	uint32_t *written; /* by slot */
	uint8_t *finished; /* by slot */
	uint16_t first;
	uint16_t count;
};

struct virtqueue {
	union {
		struct split_ring split;
		struct packed_ring packed;
	};
	struct guest_memory *memory;
	uint16_t size;
	bool is_packed;
	bool event_idx;
	bool indirect;
	bool in_order;
	bool notify_on_empty;
	bool signalled; /* false: signal at the next opportunity, whatever the driver asked for */
	bool log_data;	/* LOG_ALL: what is written into buffers goes into the dirty log */
	bool log_used;	/* and what is written into the ring */
	bool broken;
	bool lost;	  /* the log's file was truncated */
	uint64_t counter; /* order of arrival, for the log */
	uint64_t calls;	  /* times that the driver was signalled */
	int kick_fd;
	int call_fd;
	int error_fd;
	uint64_t id;
	struct reactor *reactor;
	struct mapping log_mapping;
	uint64_t desc_user; /* where the rings are, to find them in another table of memory */
	uint64_t avail_user;
	uint64_t used_user;
	uint64_t used_log;
	struct vq_order order;
	uint16_t *resubmit; /* slots to serve again, in order */
	uint32_t resubmit_count;
	uint32_t resubmit_next;
	struct iotlb_miss miss; /* why a chain could not be read */
};

/* Takes a reference on @memory. 0 or -errno, with a notice that says why. */
int vq_start(struct virtqueue *vq, struct reactor *reactor, struct guest_memory *memory,
	     const struct vq_setup *setup);
void vq_stop(struct virtqueue *vq);
/*
 * Signal the driver through a duplicate of another eventfd, at once and from now on, or (-1) not at all. 0 or
 * -errno (nothing changed).
 */
int vq_set_call(struct virtqueue *vq, int call_fd);
/* Use another table of guest memory from now on. 0 or -errno (the old one stays). */
int vq_set_memory(struct virtqueue *vq, struct guest_memory *memory);
/* Where to go on, as GET_VRING_BASE answers it; only after everything was completed and published. */
uint32_t vq_base(const struct virtqueue *vq);

/* Are there requests of a process that is gone, not taken yet? */
static inline bool vq_has_resubmits(const struct virtqueue *vq)
{
	return vq->resubmit_next < vq->resubmit_count && !vq->broken;
}

/* Take up to @max requests, in order, and store their slots; 0 when there are none or the queue is broken. */
unsigned vq_take(struct virtqueue *vq, uint16_t *slots, unsigned max);
/*
 * Find the buffers of a request. 0; -ENOBUFS when it has more than chain->room (call again with room for
 * VQ_MAX_SEGMENTS); -EAGAIN when an address has no translation yet (vq->miss says which); another -errno after
 * breaking the queue.
 */
int vq_read_chain(struct virtqueue *vq, uint16_t slot, struct vq_chain *chain);
/*
 * Undo vq_take() for the last @n slots that it returned, before anything else is done to the queue: they are
 * taken again. @again: they were requests of a process that is gone.
 */
void vq_put_back(struct virtqueue *vq, const uint16_t *slots, unsigned n, bool again);
/* The device is done with a request and wrote @written bytes; the driver learns it from vq_publish(). */
void vq_complete(struct virtqueue *vq, uint16_t slot, uint32_t written);
/* Publish what was completed, and signal the driver if it wants that. */
void vq_publish(struct virtqueue *vq);
/*
 * The two halves of it, for who signals less often: publish, and return how many requests that were (@entries:
 * of the ring); then signal for all that was published since the last time. True if the driver was signalled.
 * It has to be asked before a whole ring, or two of a split one, was published.
 */
uint32_t vq_publish_silently(struct virtqueue *vq, uint32_t *entries);
bool vq_signal(struct virtqueue *vq);
/* Would vq_signal() signal the driver? Changes nothing. */
bool vq_wants_signal(const struct virtqueue *vq);

/* Ask for kicks; true if requests wait nevertheless. */
bool vq_wait(struct virtqueue *vq);
/* Ask for no kicks. */
void vq_unwait(struct virtqueue *vq);

/* Stop serving: say why (rate-limited by the receiver) and signal the error eventfd. */
void vq_break(struct virtqueue *vq, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
