/*
 * A virtqueue with a poller, and requests in flight: what every device has in common. A device supplies
 * what a request means (blk.c, scsi.c); this is what takes it, keeps its memory, and completes it.
 *
 * The life of a request: the poller takes a batch of slots and reads each chain into the request of that
 * slot (there is one for every slot, so there is always one free); then the device's start() is called for
 * each. It ends in queue_complete(), before start() returns or later; what is completed is published once
 * for a batch.
 */
#ifndef VHOST_QUEUE_H
#define VHOST_QUEUE_H

#include <errno.h>
#include <sys/uio.h>

#include "bdev/bdev.h"
#include "reactor/reactor.h"
#include "vhost/coalescing.h"
#include "vhost/memory.h"
#include "vhost/throttle.h"
#include "vhost/virtqueue.h"

/* cffi: begin */
/* What one process has done for one queue: a slot of the shared statistics area. */
struct queue_stats {
	uint64_t requests; /* taken */
	uint64_t kicks;
	uint64_t calls; /* times that the driver was signalled */
	uint64_t in_flight;
	struct bdev_stats io; /* what the device asked of its bdevs for it */
};

struct queue;

/* Take no more requests; NOTICE_DRAINED follows when none is in flight. */
void queue_stop(struct queue *queue);
/*
 * The same without waiting for requests that can be taken back: they stay in the in-flight log, for who
 * serves the queue next.
 */
void queue_suspend(struct queue *queue);
/* Requests taken and not completed. */
uint32_t queue_in_flight(const struct queue *queue);
/* Did the driver want no signal when requests last completed by themselves? Then it polls for them. */
bool queue_driver_polls(const struct queue *queue);
/* Where another process would go on, once drained: what GET_VRING_BASE answers. */
uint32_t queue_base(const struct queue *queue);
/* Use another table of guest memory; requests in flight keep the old one until they complete. 0, -errno. */
int queue_set_memory(struct queue *queue, struct guest_memory *memory);
/* Signal the driver less often from now on; a delay of 0 ends that. 0 or -EINVAL, see coalescing_check(). */
int queue_set_coalescing(struct queue *queue, uint32_t delay_base_us, uint32_t iops_threshold);
/*
 * Take no more requests a second than a struct qos_limits in @fd allows, which stays the caller's: others may
 * draw on it, too. Again when it has changed; -1: any number. 0, -errno.
 */
int queue_set_limits(struct queue *queue, int fd);
/* Signal the driver through another eventfd (a duplicate), or (-1) not at all. 0, -errno. */
int queue_set_call(struct queue *queue, int call_fd);
/*
 * A request waits in its ring for a translation (after NOTICE_WAITING): true, and of what in @miss. Then
 * queue_resume() when it is known, or queue_fault() when there is none, which breaks the queue.
 */
bool queue_waits(const struct queue *queue, struct iotlb_miss *miss);
void queue_resume(struct queue *queue);
void queue_fault(struct queue *queue);
/* Free a stopped queue with nothing in flight, and the device's part of it. */
void queue_free(struct queue *queue);
/* cffi: end */

#define QUEUE_INLINE_SEGMENTS 6

/* The first member of a device's request. */
struct queue_request {
	struct queue *queue;
	struct guest_memory *memory; /* referenced while in flight; NULL otherwise */
	struct vq_chain chain;	     /* the device may move chain.iov and the counts forward */
	uint16_t slot;
	bool again;    /* another process had begun it: it may have been carried out, wholly or in part */
	uint8_t epoch; /* of iotlb_enter() */
	struct iovec iov[QUEUE_INLINE_SEGMENTS];
};

/* The first member of what few requests need: memory that is never touched is never allocated. */
struct queue_request_extra {
	struct iovec iov[VQ_MAX_SEGMENTS];
};

struct queue_ops {
	size_t request_size;	     /* of the device's request, which begins with struct queue_request */
	size_t extra_size;	     /* of the device's extra, which begins with struct queue_request_extra */
	struct throttle_frame frame; /* of a request that may be limited */
	/* Make of a request what is to be done; it may complete already. */
	void (*start)(struct queue_request *request);
	/* All requests of a batch were started: do what start() has put off. */
	void (*submit)(struct queue *queue);
	void (*free)(struct queue *queue);
	/* Try to end a request in flight before its time, in queue_leave(). NULL: none can be. */
	void (*abort)(struct queue_request *request);
	/*
	 * How many requests it has a use for now; when that was 0 and is no more, the poller must be woken.
	 * NULL: any number, at any time.
	 */
	uint32_t (*wanted)(const struct queue *queue);
};

/* The first member of a device's queue. */
#define QUEUE_BATCH 64 /* requests taken at a time */

struct queue {
	const struct queue_ops *ops;
	struct virtqueue vq;
	struct poller poller;
	struct fd_watch kick;
	struct coalescing coalescing;
	struct throttle throttle;
	struct deferred publish; /* for completions that come outside of the poller */
	struct reactor *reactor;
	struct queue_stats *stats;
	char *requests; /* by slot */
	char *extra;	/* by slot */
	uint32_t in_flight;
	uint32_t unpublished_bytes;
	uint64_t reply_ticks; /* in which a driver that polls goes on after a completion */
	bool driver_polls;    /* it did not want to be signalled when it last could have been */
	bool running;	      /* inside the poller */
	bool waiting;	      /* for a translation: nothing is taken */
	uint32_t waits;	      /* of the same request, the one that is taken after @waits_after others */
	uint64_t waits_after;
	bool stopping;
	bool suspending; /* and what can be taken back is left */
	bool drained;	 /* and NOTICE_DRAINED was sent */
};

/*
 * Start a queue whose memory is zeroed but for what is the device's own. 0, or -errno with nothing left
 * behind but @queue itself, which stays the caller's.
 */
int queue_start(struct queue *queue, const struct queue_ops *ops, struct reactor *reactor,
		struct guest_memory *memory, const struct vq_setup *setup, uint32_t slot);

/*
 * A request is done; @written bytes were written to its buffers. @bytes is how much work it was: after
 * some, what is complete is published in the middle of a batch, so that the driver need not wait for all.
 */
void queue_complete(struct queue_request *request, uint32_t written, uint64_t bytes);

/* A request of a queue that is suspending is not going to be carried out: it stays in the log. */
void queue_leave(struct queue_request *request);

/*
 * Before queue_complete(): the device may have written to the first @bytes of the writable part, and to
 * @size bytes at @extra (or NULL), such as a status that stands at its end.
 */
void queue_log_written(struct queue_request *request, uint64_t bytes, const void *extra, size_t size);

/* Is a migration under way, so that queue_log_written() must be told what was written? */
static inline bool queue_logs(const struct queue_request *request)
{
	return __builtin_expect(request->queue->vq.log_data, 0);
}

/* Complete a request whose answer are @size bytes at the front of its writable part, as far as they fit. */
void queue_answer(struct queue_request *request, const void *answer, size_t size);

/* Count a request to a bdev that has ended, once. */
static inline void queue_count_io(struct queue *queue, struct bdev_io *io, int status)
{
	if (__builtin_expect(io->submitted && status != -ECANCELED, 1)) {
		bdev_count(&queue->stats->io, io, status, reactor_now(queue->reactor));
		io->submitted = 0;
	}
}

static inline void *queue_request_extra(const struct queue_request *request)
{
	const struct queue *queue = request->queue;

	return queue->extra + request->slot * queue->ops->extra_size;
}

/* --- framing: what is first and last in a chain does not depend on how the driver cut it (2.7.4.1) --- */

/* Move @size bytes out of the front of the readable part, which has as many, to @out. */
void chain_take(struct vq_chain *chain, void *out, size_t size);
/* Copy to the front of the writable part; returns how many bytes fitted. */
size_t chain_put(const struct vq_chain *chain, const void *data, size_t size);

/* The writable part; the readable one is at chain->iov. */
static inline struct iovec *chain_writable(const struct vq_chain *chain)
{
	return chain->iov + chain->readable;
}

#endif
