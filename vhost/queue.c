#include "vhost/queue.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "vhost/dirty.h"
#include "vhost/iotlb.h"
#include "vhost/ring.h"

/* Publish in the middle of a batch after this much work: the driver can go on while we copy. */
#define PUBLISH_BYTES 65536
/*
 * And take no more in one turn than this, 20 us of copying: other queues of this reactor wait for as long. What
 * one request has is not divided.
 */
#define TURN_BYTES (256 << 10)
#define REPLY_NS 10000
/* A request waits once for each of its buffers; for more only if its translations are taken away meanwhile. */
#define MAX_WAITS (2 * VQ_MAX_SEGMENTS)

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

_Static_assert(sizeof(struct queue_stats) <= REACTOR_SLOT_SIZE, "a slot holds it");

/* --- completing ------------------------------------------------------------------------------------- */

static void publish(struct queue *queue)
{
	queue->unpublished_bytes = 0;
	if (unlikely(queue->coalescing.base != 0)) {
		coalescing_publish(&queue->coalescing);
		if (queue->stopping) {
			coalescing_flush(&queue->coalescing);
		}
	} else {
		vq_publish(&queue->vq);
	}
	queue->stats->calls = queue->vq.calls;
	queue->stats->in_flight = queue->in_flight;
	if (unlikely(queue->stopping && queue->in_flight == 0 && queue->poller.reactor == NULL &&
		     !queue->drained)) {
		queue->drained = true;
		reactor_notify(queue->reactor, queue->vq.id, NOTICE_DRAINED, 0, "drained");
	}
}

/* Does the driver want a signal that is held back? */
static bool holds_signal(const struct queue *queue)
{
	return unlikely(coalescing_holds(&queue->coalescing)) && vq_wants_signal(&queue->vq);
}

/*
 * Requests have completed by themselves. A driver that polls for them will send the next ones at once: better
 * to be there than to sleep in between, and be kicked.
 */
static void run_publish(struct deferred *deferred)
{
	struct queue *queue = container_of(deferred, struct queue, publish);
	uint64_t calls = queue->vq.calls;

	if (queue->driver_polls && !queue->stopping && queue->poller.sleep != NULL) {
		poller_expect(&queue->poller, queue->reply_ticks);
	}
	publish(queue);
	queue->driver_polls = queue->vq.calls == calls && !holds_signal(queue);
}

static inline void end_request(struct queue *queue, struct queue_request *request)
{
	if (unlikely(request->memory->iotlb != NULL)) {
		iotlb_leave(request->memory->iotlb, request->epoch);
	}
	guest_memory_put(request->memory);
	request->memory = NULL;
	queue->in_flight--;
}

void queue_complete(struct queue_request *request, uint32_t written, uint64_t bytes)
{
	struct queue *queue = request->queue;

	vq_complete(&queue->vq, request->slot, written);
	end_request(queue, request);
	queue->unpublished_bytes += (uint32_t)bytes;
	if (!queue->running) {
		reactor_defer(queue->reactor, &queue->publish);
	} else if (queue->unpublished_bytes >= PUBLISH_BYTES) {
		publish(queue);
	}
}

void queue_leave(struct queue_request *request)
{
	struct queue *queue = request->queue;

	end_request(queue, request);
	reactor_defer(queue->reactor, &queue->publish);
}

void queue_log_written(struct queue_request *request, uint64_t bytes, const void *extra, size_t size)
{
	const struct vq_chain *chain = &request->chain;
	const struct iovec *iov = chain_writable(chain);

	for (uint32_t i = 0; i < chain->writable && bytes > 0; i++) {
		uint64_t part = iov[i].iov_len < bytes ? iov[i].iov_len : bytes;

		dirty_host(request->memory, iov[i].iov_base, part);
		bytes -= part;
	}
	if (extra != NULL) {
		dirty_host(request->memory, extra, size);
	}
}

void queue_answer(struct queue_request *request, const void *answer, size_t size)
{
	size_t written = chain_put(&request->chain, answer, size);

	if (unlikely(queue_logs(request))) {
		queue_log_written(request, written, NULL, 0);
	}
	queue_complete(request, (uint32_t)written, 0);
}

void chain_take(struct vq_chain *chain, void *out, size_t size)
{
	chain->readable_bytes -= size;
	while (size > 0) {
		struct iovec *first = chain->iov;
		size_t part = first->iov_len < size ? first->iov_len : size;

		memcpy(out, first->iov_base, part);
		out = (char *)out + part;
		size -= part;
		first->iov_base = (char *)first->iov_base + part;
		first->iov_len -= part;
		if (first->iov_len == 0) {
			chain->iov++;
			chain->readable--;
		}
	}
}

size_t chain_put(const struct vq_chain *chain, const void *data, size_t size)
{
	const struct iovec *iov = chain_writable(chain);
	size_t done = 0;

	for (uint32_t i = 0; i < chain->writable && done < size; i++) {
		size_t part = iov[i].iov_len < size - done ? iov[i].iov_len : size - done;

		memcpy(iov[i].iov_base, (const char *)data + done, part);
		done += part;
	}
	return done;
}

/* --- the poller ------------------------------------------------------------------------------------- */

static inline struct queue_request *request_at(struct queue *queue, uint16_t slot)
{
	return (struct queue_request *)(queue->requests + slot * queue->ops->request_size);
}

/* Read a chain into its request, and bring into the cache what start() touches first and last. */
static struct queue_request *read_request(struct queue *queue, uint16_t slot)
{
	struct queue_request *request = request_at(queue, slot);
	struct vq_chain *chain = &request->chain;
	uint32_t buffers;
	int rc;

	chain->iov = request->iov;
	chain->room = QUEUE_INLINE_SEGMENTS;
	rc = vq_read_chain(&queue->vq, slot, chain);
	if (unlikely(rc == -ENOBUFS)) {
		chain->iov =
		    ((struct queue_request_extra *)(queue->extra + slot * queue->ops->extra_size))->iov;
		chain->room = VQ_MAX_SEGMENTS;
		rc = vq_read_chain(&queue->vq, slot, chain);
	}
	if (unlikely(rc < 0)) {
		return NULL;
	}
	request->queue = queue;
	request->slot = slot;
	request->memory = guest_memory_get(queue->vq.memory);
	if (unlikely(request->memory->iotlb != NULL)) {
		request->epoch = iotlb_enter(request->memory->iotlb);
	}
	queue->in_flight++;
	buffers = chain->readable + chain->writable;
	if (likely(buffers > 0)) {
		__builtin_prefetch(chain->iov[0].iov_base);
		__builtin_prefetch(chain->iov[buffers - 1].iov_base, 1);
	}
	return request;
}

/* How many requests to take. What another process has left is served in any case. */
static unsigned room(const struct queue *queue)
{
	uint32_t wanted;

	if (unlikely(queue->waiting || throttle_holds(&queue->throttle))) {
		return 0;
	}
	if (likely(queue->ops->wanted == NULL) || vq_has_resubmits(&queue->vq)) {
		return QUEUE_BATCH;
	}
	wanted = queue->ops->wanted(queue);
	return wanted < QUEUE_BATCH ? wanted : QUEUE_BATCH;
}

/*
 * An address of the next request has no translation yet. It waits in the ring, so that a queue that stops
 * meanwhile has not taken it. What was in flight when another process was killed (@again) counts as taken: it
 * cannot wait for longer than the queue is served.
 */
static void wait_for_translation(struct queue *queue, uint64_t taken_before, bool again)
{
	queue->waits = queue->waits_after == taken_before ? queue->waits + 1 : 1;
	queue->waits_after = taken_before;
	if ((queue->stopping && again) || queue->waits > MAX_WAITS) {
		queue_fault(queue);
		return;
	}
	queue->waiting = true;
	reactor_notify(queue->reactor, queue->vq.id, NOTICE_WAITING, 0, "translation");
}

/* Leave in the ring what the limits do not admit yet: @request, just read, and those after it. */
static bool admit(struct queue *queue, struct queue_request *request, const uint16_t *slots, unsigned n)
{
	if (throttle_admits(&queue->throttle, &queue->ops->frame, &request->chain)) {
		return true;
	}
	end_request(queue, request);
	vq_put_back(&queue->vq, slots, n, false);
	return false;
}

static int run(struct poller *poller)
{
	struct queue *queue = container_of(poller, struct queue, poller);
	struct queue_request *batch[QUEUE_BATCH];
	uint16_t slots[QUEUE_BATCH];
	bool again = vq_has_resubmits(&queue->vq); /* then all of the batch is */
	unsigned taken = vq_take(&queue->vq, slots, room(queue));
	unsigned count = 0;
	uint64_t bytes = 0;

	if (taken == 0) {
		if (unlikely(queue->vq.broken)) {
			poller_stop(poller);
			/* It may have broken while it was stopping: somebody waits to hear of its end. */
			reactor_defer(queue->reactor, &queue->publish);
		}
		return 0;
	}
	queue->running = true;
	while (count < taken) {
		batch[count] = read_request(queue, slots[count]);
		if (unlikely(batch[count] == NULL)) {
			if (!queue->vq.broken) {
				vq_put_back(&queue->vq, &slots[count], taken - count, again);
				wait_for_translation(queue, queue->stats->requests + count, again);
			}
			break;
		}
		/* What another process had begun is not held back: it was admitted there. */
		if (unlikely(queue->throttle.limits != NULL) && !again &&
		    !admit(queue, batch[count], &slots[count], taken - count)) {
			break;
		}
		batch[count]->again = again;
		bytes += batch[count]->chain.readable_bytes + batch[count]->chain.writable_bytes;
		count++;
		if (unlikely(bytes >= TURN_BYTES) && count < taken) {
			vq_put_back(&queue->vq, &slots[count], taken - count, again);
			break;
		}
	}
	for (unsigned i = 0; i < count; i++) {
		queue->ops->start(batch[i]);
	}
	queue->ops->submit(queue);
	queue->running = false;
	queue->stats->requests += count;
	reactor_count_ios(queue->reactor, count);
	if (unlikely(queue->stopping && !vq_has_resubmits(&queue->vq))) {
		poller_stop(poller);
	}
	publish(queue);
	return (int)count;
}

static int sleep_until_kicked(struct poller *poller)
{
	struct queue *queue = container_of(poller, struct queue, poller);

	if (unlikely(room(queue) == 0)) {
		return 0;
	}
	if (vq_wait(&queue->vq)) {
		vq_unwait(&queue->vq);
		return 1;
	}
	return 0;
}

static void wake(struct poller *poller)
{
	vq_unwait(&container_of(poller, struct queue, poller)->vq);
}

static void kicked(struct fd_watch *watch)
{
	struct queue *queue = container_of(watch, struct queue, kick);

	queue->stats->kicks++;
	poller_wake(&queue->poller);
}

/* --- life ------------------------------------------------------------------------------------------- */

static int allocate(struct queue *queue)
{
	size_t bytes = ((size_t)queue->vq.size * queue->ops->request_size + 63) & ~(size_t)63;

	queue->requests = aligned_alloc(64, bytes);
	if (queue->requests == NULL) {
		return -ENOMEM;
	}
	memset(queue->requests, 0, bytes);
	queue->extra = mmap(NULL, queue->vq.size * queue->ops->extra_size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (queue->extra == MAP_FAILED) {
		queue->extra = NULL;
		return -errno;
	}
	return 0;
}

static int watch_kicks(struct queue *queue)
{
	queue->poller.run = run;
	queue->poller.wake = wake;
	queue->kick.fd = queue->vq.kick_fd;
	queue->kick.ready = kicked;
	if (queue->kick.fd < 0) {
		return 0; /* the driver never kicks: never sleep */
	}
	queue->poller.sleep = sleep_until_kicked;
	return fd_watch_start(queue->reactor, &queue->kick);
}

static void release(struct queue *queue)
{
	fd_watch_stop(queue->reactor, &queue->kick);
	if (queue->poller.reactor != NULL) {
		poller_stop(&queue->poller);
	}
	coalescing_flush(&queue->coalescing);
	throttle_end(&queue->throttle);
	reactor_cancel(queue->reactor, &queue->publish);
	if (queue->extra != NULL) {
		munmap(queue->extra, queue->vq.size * queue->ops->extra_size);
	}
	free(queue->requests);
	vq_stop(&queue->vq);
}

int queue_start(struct queue *queue, const struct queue_ops *ops, struct reactor *reactor,
		struct guest_memory *memory, const struct vq_setup *setup, uint32_t slot)
{
	int rc;

	queue->ops = ops;
	queue->reactor = reactor;
	queue->stats = reactor_slot(reactor, slot);
	queue->publish.run = run_publish;
	queue->reply_ticks = reactor_ns_to_ticks(REPLY_NS);
	queue->kick.fd = -1;
	rc = vq_start(&queue->vq, reactor, memory, setup);
	if (rc == 0) {
		rc = allocate(queue);
	}
	if (rc == 0) {
		rc = watch_kicks(queue);
	}
	if (rc < 0) {
		release(queue);
		return rc;
	}
	poller_start(reactor, &queue->poller);
	return 0;
}

void queue_stop(struct queue *queue)
{
	if (queue->stopping) {
		return;
	}
	queue->stopping = true;
	if (queue->waiting && vq_has_resubmits(&queue->vq) && !queue->suspending) {
		queue_fault(queue); /* see wait_for_translation() */
	}
	fd_watch_stop(queue->reactor, &queue->kick);
	/* What was in flight when another process died counts as taken: it is served before we stop. */
	if (!vq_has_resubmits(&queue->vq)) {
		poller_stop(&queue->poller);
	}
	reactor_defer(queue->reactor, &queue->publish);
}

void queue_suspend(struct queue *queue)
{
	queue->suspending = true;
	queue_stop(queue);
	/* What another process has left, and we have not taken again, stands in the log as it is. */
	if (queue->poller.reactor != NULL) {
		poller_stop(&queue->poller);
	}
	for (uint32_t slot = 0; queue->ops->abort != NULL && slot < queue->vq.size; slot++) {
		struct queue_request *request = request_at(queue, (uint16_t)slot);

		if (request->memory != NULL) {
			queue->ops->abort(request);
		}
	}
}

uint32_t queue_in_flight(const struct queue *queue)
{
	return queue->in_flight;
}

bool queue_driver_polls(const struct queue *queue)
{
	return queue->driver_polls;
}

uint32_t queue_base(const struct queue *queue)
{
	return vq_base(&queue->vq);
}

int queue_set_memory(struct queue *queue, struct guest_memory *memory)
{
	return vq_set_memory(&queue->vq, memory);
}

int queue_set_coalescing(struct queue *queue, uint32_t delay_base_us, uint32_t iops_threshold)
{
	return coalescing_set(&queue->coalescing, &queue->vq, delay_base_us, iops_threshold);
}

int queue_set_limits(struct queue *queue, int fd)
{
	return throttle_set(&queue->throttle, queue->reactor, &queue->poller, fd);
}

int queue_set_call(struct queue *queue, int call_fd)
{
	return vq_set_call(&queue->vq, call_fd);
}

bool queue_waits(const struct queue *queue, struct iotlb_miss *miss)
{
	*miss = queue->vq.miss;
	return queue->waiting;
}

void queue_resume(struct queue *queue)
{
	queue->waiting = false;
	poller_wake(&queue->poller);
}

void queue_fault(struct queue *queue)
{
	const struct iotlb_miss *miss = &queue->vq.miss;

	vq_break(&queue->vq, -EFAULT,
		 "IOVA %#" PRIx64 ", %" PRIu64 " bytes to be %s: the front-end's IOMMU does not translate it",
		 miss->iova, miss->size, miss->access & IOTLB_WRITE ? "written" : "read");
	queue_resume(queue);
}

void queue_free(struct queue *queue)
{
	release(queue);
	queue->ops->free(queue);
}
