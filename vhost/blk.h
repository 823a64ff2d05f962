/* Requests of a virtio-blk device (virtio 1.2, section 5.2.6), served from a bdev. */
#ifndef VHOST_BLK_H
#define VHOST_BLK_H

#include "bdev/bdev.h"
#include "vhost/queue.h"

/* cffi: begin */
#define BLK_MAX_SEGMENTS 64 /* of one discard or write-zeroes request */

struct blk_setup {
	uint32_t slot; /* of the statistics area */
	bool readonly;
	bool write_through;	       /* a write is durable when it completes */
	bool discard;		       /* VIRTIO_BLK_F_DISCARD was negotiated */
	bool write_zeroes;	       /* VIRTIO_BLK_F_WRITE_ZEROES was negotiated */
	uint32_t max_discard_sectors;  /* a segment; the same for write zeroes */
	uint32_t max_discard_segments; /* at most BLK_MAX_SEGMENTS */
	char serial[20];	       /* GET_ID, zero padded */
};

/* Serve a queue at once, from @bdev or (NULL) from none. NULL and errno on failure, with a notice. */
struct queue *blk_queue_start(struct reactor *reactor, struct guest_memory *memory, struct bdev *bdev,
			      const struct vq_setup *vq, const struct blk_setup *blk);
/* Serve another device from now on, or none (NULL): requests then fail with VIRTIO_BLK_S_IOERR. */
void blk_queue_set_bdev(struct queue *queue, struct bdev *bdev);
/* cffi: end */

#endif
