/*
 * The device's side of a virtqueue (virtio 1.2, section 2.7), with the in-flight log that lets another
 * process take it over (vhost-user specification, "Inflight I/O tracking"). Knows nothing of what the
 * requests mean.
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
#include "vhost/memory.h"

/* cffi: begin */
#define VQ_MAX_SIZE 32768    /* entries of a split ring: section 2.7 */
#define VQ_MAX_SEGMENTS 1024 /* buffers of one chain that we accept */

/* All that is needed to serve a queue. */
struct vq_setup {
	uint64_t id;	   /* source of notices */
	uint32_t size;	   /* entries, a power of two */
	uint32_t base;	   /* next entry of the avail ring to take; ignored when @recover */
	uint64_t features; /* virtio features that were negotiated */
	uint64_t desc;	   /* addresses in the front-end's virtual address space */
	uint64_t avail;
	uint64_t used;
	int kick_fd; /* eventfds, or -1; the queue uses duplicates of its own */
	int call_fd;
	int error_fd;
	int inflight_fd; /* the in-flight log, or -1 */
	uint64_t inflight_offset;
	uint64_t inflight_size; /* bytes of this queue's part */
	bool recover;		/* take over from a process that is gone: what is in flight says the log */
};

/* Bytes that the in-flight log of a queue of @size entries needs. */
uint64_t vq_inflight_size(uint32_t size);
/* cffi: end */

/* Wire structures, virtio 1.2 section 2.7.5, 2.7.6 and 2.7.8; little-endian. */
struct vring_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags;
	uint16_t next;
};

struct vring_avail {
	uint16_t flags;
	uint16_t idx;
	uint16_t ring[]; /* and used_event after the last */
};

struct vring_used_elem {
	uint32_t id;
	uint32_t len;
};

struct vring_used {
	uint16_t flags;
	uint16_t idx;
	struct vring_used_elem ring[]; /* and avail_event after the last */
};

_Static_assert(sizeof(struct vring_desc) == 16, "virtio 2.7.5");
_Static_assert(sizeof(struct vring_used_elem) == 8, "virtio 2.7.8");
_Static_assert(offsetof(struct vring_used, ring) == 4, "virtio 2.7.8");

#define VRING_DESC_NEXT 1
#define VRING_DESC_WRITE 2
#define VRING_DESC_INDIRECT 4
#define VRING_AVAIL_NO_INTERRUPT 1
#define VRING_USED_NO_NOTIFY 1

#define VIRTIO_F_NOTIFY_ON_EMPTY 24
#define VIRTIO_F_INDIRECT_DESC 28
#define VIRTIO_F_EVENT_IDX 29
#define VIRTIO_F_VERSION_1 32

/* vhost-user specification, "Queue region of split virtqueue". */
struct inflight_desc {
	uint8_t inflight;
	uint8_t padding[5];
	uint16_t next;
	uint64_t counter;
};

struct inflight_queue {
	uint64_t features;
	uint16_t version;
	uint16_t desc_num;
	uint16_t last_batch_head;
	uint16_t used_idx;
	struct inflight_desc desc[];
};

_Static_assert(sizeof(struct inflight_desc) == 16, "vhost-user DescStateSplit");
_Static_assert(offsetof(struct inflight_queue, desc) == 16, "vhost-user QueueRegionSplit");

/* A request as the driver wrote it: first what the device reads, then what it may write. */
struct vq_chain {
	struct iovec *iov; /* given by the caller */
	uint32_t room;	   /* iovecs that fit there */
	uint32_t readable; /* iovecs */
	uint32_t writable;
	uint64_t readable_bytes;
	uint64_t writable_bytes;
};

struct virtqueue {
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	struct inflight_queue *log;
	struct guest_memory *memory;
	uint8_t *taken; /* by head: taken and not completed */
	uint16_t *done; /* heads completed and not published */
	uint16_t size;
	uint16_t mask;
	uint16_t next_avail;	/* next entry of the avail ring to take */
	uint16_t used_idx;	/* next entry of the used ring to fill */
	uint16_t published_idx; /* used->idx as the driver sees it */
	uint16_t signalled_idx; /* used->idx when it was last decided whether to signal */
	uint16_t batch_head;	/* the log's last_batch_head */
	bool event_idx;
	bool indirect;
	bool signalled_valid; /* false: signal at the next opportunity, whatever the driver asked for */
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
	uint16_t *resubmit; /* heads to serve again, in order; NULL when there are none */
	uint32_t resubmit_count;
	uint32_t resubmit_next;
};

/* Takes a reference on @memory. 0 or -errno, with a notice that says why. */
int vq_start(struct virtqueue *vq, struct reactor *reactor, struct guest_memory *memory,
	     const struct vq_setup *setup);
void vq_stop(struct virtqueue *vq);
/* Use another table of guest memory from now on. 0 or -errno (the old one stays). */
int vq_set_memory(struct virtqueue *vq, struct guest_memory *memory);

/* Take up to @max heads, in order; 0 when there are none or the queue is broken. */
unsigned vq_take(struct virtqueue *vq, uint16_t *heads, unsigned max);
/*
 * Walk the chain that begins at @head. 0; -ENOBUFS when it has more buffers than chain->room (call again
 * with room for VQ_MAX_SEGMENTS); another -errno after breaking the queue.
 */
int vq_read_chain(struct virtqueue *vq, uint16_t head, struct vq_chain *chain);
/* The device is done with @head and wrote @written bytes; the driver learns it from vq_publish(). */
void vq_complete(struct virtqueue *vq, uint16_t head, uint32_t written);
/* Publish what was completed, and signal the driver if it wants that. */
void vq_publish(struct virtqueue *vq);

/* Ask for kicks; true if entries wait nevertheless (ask again after taking them). */
bool vq_wait(struct virtqueue *vq);
/* Ask for no kicks. */
void vq_unwait(struct virtqueue *vq);

/* Stop serving: say why (rate-limited by the receiver) and signal the error eventfd. */
void vq_break(struct virtqueue *vq, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
