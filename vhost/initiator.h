/*
 * A block device that another vhost-user server has: virtio-blk, or a logical unit of virtio-scsi. Every handle
 * has a queue of its own (driver's side: vhost/frontend.h) in memory that the control process shares with the
 * server; data goes through buffers there. While the server is away, requests wait; what was in flight is done
 * again when it is back.
 */
#ifndef VHOST_INITIATOR_H
#define VHOST_INITIATOR_H

#include "bdev/bdev.h"

/* cffi: begin */
#define INITIATOR_SLOTS 64     /* requests of one handle at a time, or a third of the queue's size */
#define INITIATOR_PIECE 131072 /* bytes of data that one request has at most */

enum initiator_kind {
	INITIATOR_BLK,
	INITIATOR_SCSI,
};

/* What the disk is like. */
struct initiator_setup {
	uint64_t key; /* what the control process calls this handle's queue */
	enum initiator_kind kind;
	uint32_t queue_size;
	uint32_t block_size;
	uint64_t block_count;
	uint32_t supported; /* 1 << enum bdev_op */
	bool readonly;
	bool flush;	    /* there is a cache that has to be flushed */
	bool write_zeroes;  /* is a request; else zeroes are written */
	uint64_t max_unmap; /* bytes of one request */
	uint64_t max_zeroes;
	uint32_t target; /* of INITIATOR_SCSI */
	uint32_t lun;
};

/* A queue, as its two sides share it. */
struct initiator_link {
	int memory_fd; /* only looked at */
	int kick_fd;   /* these are the handle's own once the call has succeeded */
	int call_fd;
	bool event_idx;
	uint64_t offset; /* of the queue's area in the memory, a multiple of the page size */
	uint64_t guest;	 /* what the server calls the address where the area begins */
};

/* Where in its area a queue's parts begin, in bytes. */
struct initiator_layout {
	uint64_t desc;
	uint64_t avail;
	uint64_t used;
	uint64_t headers;
	uint64_t data;
	uint64_t size; /* of the area */
};

struct initiator_layout initiator_layout(uint32_t queue_size);

/* @link: NULL while the server is away. NULL and errno on failure. */
struct bdev *initiator_bdev_open(struct reactor *reactor, uint64_t id, uint32_t slot,
				 const struct initiator_setup *setup, const struct initiator_link *link);
/* The server is back, with another area, zeroed: 0 or -errno; -ENOENT when there is no such handle here. */
int initiator_connect(uint64_t key, const struct initiator_link *link);
/* The server is away. Nothing happens where there is no such handle. */
void initiator_disconnect(uint64_t key);
/* cffi: end */

#endif
