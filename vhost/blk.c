/*
 * The life of a request: blk_queue_run() takes a batch of slots, reads each chain into its request (one for
 * every slot, so there is always one free), then starts each: the header is copied out of guest memory and
 * checked, and the rest becomes a struct bdev_io over the guest's own pages. request_done() writes the status
 * byte and the used entry, which are published once for a batch.
 */
#include "vhost/blk.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define BATCH 32
#define SECTOR_SHIFT 9
#define SERIAL_SIZE 20
#define INLINE_SEGMENTS 6
#define MAX_RANGES 64 /* segments of one discard or write-zeroes request */
/* Publish in the middle of a batch after this many bytes: the driver can go on while we copy. */
#define PUBLISH_BYTES 16384

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* Request types and status, virtio 1.2 section 5.2.6. */
enum {
	BLK_T_IN = 0,
	BLK_T_OUT = 1,
	BLK_T_FLUSH = 4,
	BLK_T_GET_ID = 8,
	BLK_T_DISCARD = 11,
	BLK_T_WRITE_ZEROES = 13,
};

enum {
	BLK_S_OK = 0,
	BLK_S_IOERR = 1,
	BLK_S_UNSUPP = 2,
};

struct blk_header {
	uint32_t type;
	uint32_t reserved;
	uint64_t sector;
};

/* struct virtio_blk_discard_write_zeroes */
struct blk_range {
	uint64_t sector;
	uint32_t num_sectors;
	uint32_t flags;
};

#define RANGE_UNMAP 1

_Static_assert(sizeof(struct blk_header) == 16, "virtio 5.2.6");
_Static_assert(sizeof(struct blk_range) == 16, "virtio 5.2.6");
_Static_assert(sizeof(struct blk_queue_stats) <= REACTOR_SLOT_SIZE, "a slot holds it");

/* What few requests need; memory that is never touched is never allocated. */
struct request_extra {
	struct iovec iov[VQ_MAX_SEGMENTS];
	struct blk_range ranges[MAX_RANGES];
};

struct blk_request {
	struct bdev_io io;
	struct blk_queue *queue;
	struct guest_memory *memory; /* referenced while in flight */
	struct vq_chain chain;
	uint8_t *status;
	uint32_t written; /* bytes before the status byte that a success has written */
	uint16_t slot;
	uint16_t range; /* of a discard or write zeroes: the one in progress, and how many there are */
	uint16_t ranges;
	struct iovec iov[INLINE_SEGMENTS];
};

struct blk_queue {
	struct virtqueue vq;
	struct poller poller;
	struct fd_watch kick;
	struct deferred publish; /* for completions that come outside of blk_queue_run() */
	struct reactor *reactor;
	struct bdev *bdev; /* NULL: the device is gone */
	struct blk_queue_stats *stats;
	struct blk_setup setup;
	struct blk_request *requests; /* by slot */
	struct request_extra *extra;  /* by slot */
	uint32_t in_flight;
	uint32_t unpublished_bytes;
	bool running; /* inside blk_queue_run() */
	bool stopping;
};

/* --- completing ------------------------------------------------------------------------------------- */

static void publish(struct blk_queue *queue)
{
	queue->unpublished_bytes = 0;
	vq_publish(&queue->vq);
	queue->stats->calls = queue->vq.calls;
	queue->stats->in_flight = queue->in_flight;
	if (queue->stopping && queue->in_flight == 0) {
		reactor_notify(queue->reactor, queue->vq.id, NOTICE_DRAINED, 0, "drained");
	}
}

static void run_publish(struct deferred *deferred)
{
	publish((struct blk_queue *)((char *)deferred - offsetof(struct blk_queue, publish)));
}

static void finish(struct blk_request *request, uint8_t status)
{
	struct blk_queue *queue = request->queue;

	if (likely(request->status != NULL)) {
		*request->status = status;
	}
	vq_complete(&queue->vq, request->slot, status == BLK_S_OK ? request->written + 1 : 1);
	guest_memory_put(request->memory);
	queue->in_flight--;
	queue->unpublished_bytes += (uint32_t)request->io.length;
	if (!queue->running) {
		reactor_defer(queue->reactor, &queue->publish);
	} else if (queue->unpublished_bytes >= PUBLISH_BYTES) {
		publish(queue);
	}
}

static uint8_t status_of(int error)
{
	switch (error) {
	case 0:
		return BLK_S_OK;
	case -EOPNOTSUPP:
		return BLK_S_UNSUPP;
	default:
		return BLK_S_IOERR;
	}
}

static struct blk_request *request_of(struct bdev_io *io)
{
	return (struct blk_request *)((char *)io - offsetof(struct blk_request, io));
}

static void request_done(struct bdev_io *io, int error)
{
	finish(request_of(io), status_of(error));
}

/* --- framing: header first, status byte last, however the driver cut them (section 2.7.4.1) --------- */

/* Copy @size bytes out of the front of an iovec array and advance it. */
static void iov_take(struct iovec **iov, uint32_t *count, void *out, size_t size)
{
	while (size > 0) {
		struct iovec *first = *iov;
		size_t part = first->iov_len < size ? first->iov_len : size;

		memcpy(out, first->iov_base, part);
		out = (char *)out + part;
		size -= part;
		first->iov_base = (char *)first->iov_base + part;
		first->iov_len -= part;
		if (first->iov_len == 0) {
			(*iov)++;
			(*count)--;
		}
	}
}

static size_t iov_put(const struct iovec *iov, uint32_t count, const void *data, size_t size)
{
	size_t done = 0;

	for (uint32_t i = 0; i < count && done < size; i++) {
		size_t part = iov[i].iov_len < size - done ? iov[i].iov_len : size - done;

		memcpy(iov[i].iov_base, (const char *)data + done, part);
		done += part;
	}
	return done;
}

/* Cut the status byte off the end of the writable part. */
static void cut_status(struct blk_request *request)
{
	struct vq_chain *chain = &request->chain;
	struct iovec *last = &chain->iov[chain->readable + chain->writable - 1];

	while (last->iov_len == 0) {
		last--;
		chain->writable--;
	}
	last->iov_len--;
	request->status = (uint8_t *)last->iov_base + last->iov_len;
	if (last->iov_len == 0) {
		chain->writable--;
	}
	chain->writable_bytes--;
}

/* --- starting --------------------------------------------------------------------------------------- */

static bool copy_header(struct blk_request *request, struct blk_header *header)
{
	struct vq_chain *chain = &request->chain;
	struct iovec *iov = chain->iov;
	uint32_t count = chain->readable;

	if (unlikely(chain->readable_bytes < sizeof(*header))) {
		return false;
	}
	if (likely(iov->iov_len == sizeof(*header))) {
		const volatile uint64_t *words = iov->iov_base;
		uint64_t copy[2] = {words[0], words[1]};

		memcpy(header, copy, sizeof(*header));
		iov++;
		count--;
	} else {
		iov_take(&iov, &count, header, sizeof(*header));
	}
	/* The writable part stays where it is; move our view of the readable one. */
	chain->readable_bytes -= sizeof(*header);
	chain->iov = iov;
	chain->readable = count;
	return true;
}

static void start_io(struct blk_request *request, enum bdev_op op, struct iovec *iov, uint32_t count,
		     uint64_t sector, uint64_t length)
{
	struct bdev_io *io = &request->io;

	if (unlikely(request->queue->bdev == NULL || sector >> (64 - SECTOR_SHIFT) != 0)) {
		request_done(io, -EIO);
		return;
	}
	io->bdev = request->queue->bdev;
	io->iov = iov;
	io->iovcnt = count;
	io->op = op;
	io->flags = 0;
	io->offset = sector << SECTOR_SHIFT;
	io->length = length;
	bdev_submit(io);
}

static void start_read(struct blk_request *request, const struct blk_header *header)
{
	struct vq_chain *chain = &request->chain;

	if (unlikely(chain->writable_bytes > UINT32_MAX - 1)) {
		finish(request, BLK_S_IOERR);
		return;
	}
	request->written = (uint32_t)chain->writable_bytes;
	start_io(request, BDEV_READ, chain->iov + chain->readable, chain->writable, header->sector,
		 chain->writable_bytes);
}

static void start_write(struct blk_request *request, const struct blk_header *header)
{
	struct vq_chain *chain = &request->chain;

	if (unlikely(request->queue->setup.readonly)) {
		finish(request, BLK_S_IOERR);
		return;
	}
	start_io(request, BDEV_WRITE, chain->iov, chain->readable, header->sector, chain->readable_bytes);
}

static void answer_id(struct blk_request *request)
{
	struct vq_chain *chain = &request->chain;

	request->written = (uint32_t)iov_put(chain->iov + chain->readable, chain->writable,
					     request->queue->setup.serial, SERIAL_SIZE);
	finish(request, BLK_S_OK);
}

/* --- discard and write zeroes: one bdev_io after another -------------------------------------------- */

static struct blk_range *ranges_of(struct blk_request *request)
{
	return request->queue->extra[request->slot].ranges;
}

static void next_range(struct bdev_io *io, int error)
{
	struct blk_request *request = request_of(io);
	const struct blk_range *ranges = ranges_of(request);
	const struct blk_range *range;

	/* A range of no sectors is done as it stands. */
	while (request->range < request->ranges && ranges[request->range].num_sectors == 0) {
		request->range++;
	}
	io->bdev = request->queue->bdev;
	if (error != 0 || request->range == request->ranges || io->bdev == NULL) {
		io->length = 0;
		request_done(io, error == 0 && io->bdev == NULL ? -ENODEV : error);
		return;
	}
	range = &ranges[request->range++];
	io->offset = range->sector << SECTOR_SHIFT;
	io->length = (uint64_t)range->num_sectors << SECTOR_SHIFT;
	io->flags = range->flags & RANGE_UNMAP ? BDEV_IO_UNMAP : 0;
	bdev_submit(io);
}

/* The rules of section 5.2.6.2 for a range; BLK_S_OK or the status that refuses it. */
static uint8_t check_range(const struct blk_queue *queue, enum bdev_op op, const struct blk_range *range)
{
	uint32_t allowed = op == BDEV_WRITE_ZEROES ? RANGE_UNMAP : 0;

	if (range->flags & ~allowed) {
		return BLK_S_UNSUPP;
	}
	if (range->num_sectors > queue->setup.max_discard_sectors ||
	    range->sector >> (64 - SECTOR_SHIFT) != 0) {
		return BLK_S_IOERR;
	}
	return BLK_S_OK;
}

static uint8_t copy_ranges(struct blk_request *request, enum bdev_op op)
{
	struct blk_queue *queue = request->queue;
	struct vq_chain *chain = &request->chain;
	struct iovec *iov = chain->iov;
	uint32_t count = chain->readable;
	uint64_t ranges = chain->readable_bytes / sizeof(struct blk_range);

	if (queue->setup.readonly || chain->readable_bytes % sizeof(struct blk_range) != 0 || ranges == 0 ||
	    ranges > queue->setup.max_discard_segments || ranges > MAX_RANGES) {
		return BLK_S_IOERR;
	}
	iov_take(&iov, &count, ranges_of(request), chain->readable_bytes);
	request->ranges = (uint16_t)ranges;
	request->range = 0;
	for (uint64_t i = 0; i < ranges; i++) {
		uint8_t status = check_range(queue, op, &ranges_of(request)[i]);

		if (status != BLK_S_OK) {
			return status;
		}
	}
	return BLK_S_OK;
}

static void start_ranges(struct blk_request *request, enum bdev_op op)
{
	uint8_t status = copy_ranges(request, op);

	if (status != BLK_S_OK) {
		finish(request, status);
		return;
	}
	request->io.op = op;
	request->io.iov = NULL;
	request->io.iovcnt = 0;
	request->io.done = next_range;
	next_range(&request->io, 0);
}

static void start(struct blk_request *request)
{
	const struct blk_setup *setup = &request->queue->setup;
	struct vq_chain *chain = &request->chain;
	struct blk_header header;

	request->written = 0;
	request->status = NULL;
	request->io.length = 0;
	request->io.done = request_done;
	if (unlikely(chain->writable_bytes == 0)) {
		/* There is not even room for a status: all that the driver can be told is that it is over. */
		finish(request, BLK_S_IOERR);
		return;
	}
	cut_status(request);
	if (unlikely(!copy_header(request, &header))) {
		finish(request, BLK_S_IOERR);
		return;
	}
	switch (header.type) {
	case BLK_T_IN:
		start_read(request, &header);
		break;
	case BLK_T_OUT:
		start_write(request, &header);
		break;
	case BLK_T_FLUSH:
		start_io(request, BDEV_FLUSH, NULL, 0, 0, 0);
		break;
	case BLK_T_GET_ID:
		answer_id(request);
		break;
	case BLK_T_DISCARD:
		if (setup->discard) {
			start_ranges(request, BDEV_UNMAP);
			break;
		}
		finish(request, BLK_S_UNSUPP);
		break;
	case BLK_T_WRITE_ZEROES:
		if (setup->write_zeroes) {
			start_ranges(request, BDEV_WRITE_ZEROES);
			break;
		}
		finish(request, BLK_S_UNSUPP);
		break;
	default:
		finish(request, BLK_S_UNSUPP);
	}
}

/* --- the poller ------------------------------------------------------------------------------------- */

static struct blk_queue *queue_of(struct poller *poller)
{
	return (struct blk_queue *)((char *)poller - offsetof(struct blk_queue, poller));
}

/* Read the chain of a slot into its request, and bring what start() touches into the cache. */
static struct blk_request *read_request(struct blk_queue *queue, uint16_t slot)
{
	struct blk_request *request = &queue->requests[slot];
	struct vq_chain *chain = &request->chain;
	uint32_t last;
	int rc;

	chain->iov = request->iov;
	chain->room = INLINE_SEGMENTS;
	rc = vq_read_chain(&queue->vq, slot, chain);
	if (unlikely(rc == -ENOBUFS)) {
		chain->iov = queue->extra[slot].iov;
		chain->room = VQ_MAX_SEGMENTS;
		rc = vq_read_chain(&queue->vq, slot, chain);
	}
	if (unlikely(rc < 0)) {
		return NULL;
	}
	request->queue = queue;
	request->slot = slot;
	request->memory = guest_memory_get(queue->vq.memory);
	queue->in_flight++;
	last = chain->readable + chain->writable;
	if (likely(last > 0)) {
		__builtin_prefetch(chain->iov[0].iov_base);
		__builtin_prefetch(chain->iov[last - 1].iov_base, 1);
	}
	return request;
}

static int blk_queue_run(struct poller *poller)
{
	struct blk_queue *queue = queue_of(poller);
	struct blk_request *batch[BATCH];
	uint16_t slots[BATCH];
	unsigned taken = vq_take(&queue->vq, slots, BATCH);
	unsigned count = 0;

	if (taken == 0) {
		if (unlikely(queue->vq.broken)) {
			poller_stop(poller);
		}
		return 0;
	}
	queue->running = true;
	while (count < taken) {
		batch[count] = read_request(queue, slots[count]);
		if (unlikely(batch[count] == NULL)) {
			break;
		}
		count++;
	}
	for (unsigned i = 0; i < count; i++) {
		start(batch[i]);
	}
	queue->running = false;
	queue->stats->requests += count;
	reactor_count_ios(queue->reactor, count);
	publish(queue);
	return (int)count;
}

static int blk_queue_sleep(struct poller *poller)
{
	struct blk_queue *queue = queue_of(poller);

	if (vq_wait(&queue->vq)) {
		vq_unwait(&queue->vq);
		return 1;
	}
	return 0;
}

static void blk_queue_wake(struct poller *poller)
{
	vq_unwait(&queue_of(poller)->vq);
}

static void kicked(struct fd_watch *watch)
{
	struct blk_queue *queue = (struct blk_queue *)((char *)watch - offsetof(struct blk_queue, kick));

	queue->stats->kicks++;
	poller_wake(&queue->poller);
}

/* --- life ------------------------------------------------------------------------------------------- */

static int allocate(struct blk_queue *queue, uint32_t size)
{
	size_t bytes = size * sizeof(*queue->requests);

	queue->requests = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
	if (queue->requests == NULL) {
		return -ENOMEM;
	}
	memset(queue->requests, 0, bytes);
	queue->extra = mmap(NULL, size * sizeof(*queue->extra), PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (queue->extra == MAP_FAILED) {
		queue->extra = NULL;
		return -errno;
	}
	return 0;
}

static int start_kicks(struct blk_queue *queue)
{
	queue->poller.run = blk_queue_run;
	queue->poller.wake = blk_queue_wake;
	queue->kick.fd = queue->vq.kick_fd;
	queue->kick.ready = kicked;
	if (queue->kick.fd < 0) {
		return 0; /* the driver never kicks: never sleep */
	}
	queue->poller.sleep = blk_queue_sleep;
	return fd_watch_start(queue->reactor, &queue->kick);
}

struct blk_queue *blk_queue_start(struct reactor *reactor, struct guest_memory *memory, struct bdev *bdev,
				  const struct vq_setup *vq, const struct blk_setup *setup)
{
	struct blk_queue *queue = calloc(1, sizeof(*queue));
	int rc;

	if (queue == NULL) {
		errno = ENOMEM;
		return NULL;
	}
	queue->reactor = reactor;
	queue->bdev = bdev;
	queue->setup = *setup;
	queue->stats = reactor_slot(reactor, setup->slot);
	queue->publish.run = run_publish;
	queue->kick.fd = -1;
	rc = vq_start(&queue->vq, reactor, memory, vq);
	if (rc == 0) {
		rc = allocate(queue, vq->size);
	}
	if (rc == 0) {
		rc = start_kicks(queue);
	}
	if (rc < 0) {
		blk_queue_free(queue);
		errno = -rc;
		return NULL;
	}
	poller_start(reactor, &queue->poller);
	return queue;
}

void blk_queue_stop(struct blk_queue *queue)
{
	if (queue->stopping) {
		return;
	}
	queue->stopping = true;
	fd_watch_stop(queue->reactor, &queue->kick);
	poller_stop(&queue->poller);
	reactor_defer(queue->reactor, &queue->publish);
}

uint32_t blk_queue_in_flight(const struct blk_queue *queue)
{
	return queue->in_flight;
}

uint32_t blk_queue_base(const struct blk_queue *queue)
{
	return vq_base(&queue->vq);
}

int blk_queue_set_memory(struct blk_queue *queue, struct guest_memory *memory)
{
	return vq_set_memory(&queue->vq, memory);
}

void blk_queue_set_bdev(struct blk_queue *queue, struct bdev *bdev)
{
	queue->bdev = bdev;
}

void blk_queue_free(struct blk_queue *queue)
{
	size_t extra = (size_t)queue->vq.size * sizeof(*queue->extra);

	fd_watch_stop(queue->reactor, &queue->kick);
	if (queue->poller.reactor != NULL) {
		poller_stop(&queue->poller);
	}
	reactor_cancel(queue->reactor, &queue->publish);
	vq_stop(&queue->vq);
	if (queue->extra != NULL) {
		munmap(queue->extra, extra);
	}
	free(queue->requests);
	free(queue);
}
