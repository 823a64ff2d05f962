/* What the initiator's requests are made of, for initiator.c and the formats of both kinds of devices. */
#ifndef VHOST_INITIATOR_INTERNAL_H
#define VHOST_INITIATOR_INTERNAL_H

#include "bdev/bounce.h"
#include "vhost/frontend.h"
#include "vhost/initiator.h"

#define INITIATOR_HEADER 512 /* bytes beside the data of a request: what is asked, and the answer */
#define INITIATOR_ANSWER 256 /* where in it the device writes */
#define INITIATOR_BUFFERS 3  /* of a request at most */
#define INITIATOR_QUEUE_MAX 1024

/* What the end of a request may be, beside 0 and -errno. */
#define INITIATOR_AGAIN 1 /* at once */
#define INITIATOR_LATER 2 /* in a while: the device is busy */

struct initiator;

struct initiator_format {
	/*
	 * Write what is asked for into the header of @slot and the buffers into @buffers. Returns how many
	 * buffers there are.
	 */
	uint32_t (*ask)(struct initiator *disk, struct bounce_slot *slot, struct front_buffer *buffers);
	/* How the request of @slot has ended. */
	int (*answer)(struct initiator *disk, struct bounce_slot *slot);
};

extern const struct initiator_format initiator_blk, initiator_scsi;

struct initiator {
	struct bdev bdev;
	struct bounce bounce;
	struct initiator *next;
	struct initiator_setup setup;
	const struct initiator_format *format;
	struct poller poller;
	struct fd_watch call;
	struct deferred publish;
	struct timer retry;
	uint64_t later;	   /* 1 << slot: to be asked again when the timer fires */
	uint64_t flushing; /* 1 << slot: the write is done, what follows is a flush (FUA) */
	uint8_t attempts[INITIATOR_SLOTS];
	uint8_t slot_of[INITIATOR_QUEUE_MAX]; /* by head */
	/* Of the connection; queue is NULL while there is none. */
	struct front_queue *queue;
	struct initiator_layout layout;
	uint8_t *area;
	uint64_t guest;
	int kick_fd;
	bool broken; /* the server breaks the rules: everything fails until it is another one */
};

static inline uint8_t *initiator_header(const struct initiator *disk, const struct bounce_slot *slot)
{
	return disk->area + disk->layout.headers + (size_t)slot->index * INITIATOR_HEADER;
}

static inline bool initiator_is_flush(const struct initiator *disk, const struct bounce_slot *slot)
{
	return slot->io->op == BDEV_FLUSH || (disk->flushing & 1ULL << slot->index);
}

static inline struct front_buffer initiator_buffer(const struct initiator *disk, const void *address,
						   uint64_t length, bool device_writes)
{
	return (struct front_buffer){
	    .addr = disk->guest + (uint64_t)((const uint8_t *)address - disk->area),
	    .len = (uint32_t)length,
	    .device_writes = device_writes,
	};
}

#endif
