/* One virtqueue of a virtio-blk device (virtio 1.2, section 5.2), served from a bdev. */
#ifndef VHOST_BLK_H
#define VHOST_BLK_H

#include "bdev/bdev.h"
#include "vhost/virtqueue.h"

/* cffi: begin */
/* What one process has done for one queue: a slot of the shared statistics area. */
struct blk_queue_stats {
	uint64_t requests; /* by the driver, of any kind */
	uint64_t kicks;
	uint64_t calls; /* times that the driver was signalled */
	uint64_t in_flight;
};

struct blk_setup {
	uint32_t slot; /* of the statistics area */
	bool readonly;
	bool discard;		      /* VIRTIO_BLK_F_DISCARD was negotiated */
	bool write_zeroes;	      /* VIRTIO_BLK_F_WRITE_ZEROES was negotiated */
	uint32_t max_discard_sectors; /* a segment; the same for write zeroes */
	uint32_t max_discard_segments;
	char serial[20]; /* GET_ID, zero padded (section 5.2.6) */
};

struct blk_queue;

/* Serve a queue at once. NULL and errno on failure, with a notice that says why. */
struct blk_queue *blk_queue_start(struct reactor *reactor, struct guest_memory *memory, struct bdev *bdev,
				  const struct vq_setup *vq, const struct blk_setup *blk);
/* Take no more requests; NOTICE_DRAINED follows when none is in flight. */
void blk_queue_stop(struct blk_queue *queue);
/* Requests taken and not completed. */
uint32_t blk_queue_in_flight(const struct blk_queue *queue);
/* The next entry of the avail ring that would be taken: what GET_VRING_BASE answers once drained. */
uint32_t blk_queue_base(const struct blk_queue *queue);
/* Use another table of guest memory; requests in flight keep the old one until they complete. 0, -errno. */
int blk_queue_set_memory(struct blk_queue *queue, struct guest_memory *memory);
/* Serve another device from now on, or none (NULL): requests then fail with VIRTIO_BLK_S_IOERR. */
void blk_queue_set_bdev(struct blk_queue *queue, struct bdev *bdev);
/* Free a stopped queue with nothing in flight. */
void blk_queue_free(struct blk_queue *queue);
/* cffi: end */

#endif
