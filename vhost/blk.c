/*
 * start() copies a request's header out of guest memory, checks it, and makes of the rest a struct bdev_io
 * over the guest's own pages; finish() writes the status byte.
 */
#include "vhost/blk.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "vhost/ring.h"

#define SECTOR_SHIFT 9
#define SERIAL_SIZE 20

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

struct blk_request {
	struct queue_request base;
	struct bdev_io io;
	uint8_t *status;
	uint32_t written; /* bytes before the status byte that a success has written */
	uint16_t range;	  /* of a discard or write zeroes: how many are started, and how many there are */
	uint16_t ranges;
};

struct blk_extra {
	struct queue_request_extra base;
	struct blk_range ranges[BLK_MAX_SEGMENTS];
};

struct blk_queue {
	struct queue base;
	struct bdev *bdev;		    /* NULL: the device is gone */
	struct bdev_io *ready[QUEUE_BATCH]; /* of this batch, to be submitted together */
	uint32_t ready_count;
	struct blk_setup setup;
};

static struct blk_queue *queue_of(const struct blk_request *request)
{
	return (struct blk_queue *)request->base.queue;
}

static struct blk_request *request_of(struct bdev_io *io)
{
	return (struct blk_request *)((char *)io - offsetof(struct blk_request, io));
}

/* --- ending ----------------------------------------------------------------------------------------- */

static void finish(struct blk_request *request, uint8_t status)
{
	if (likely(request->status != NULL)) {
		*request->status = status;
	}
	if (unlikely(queue_logs(&request->base))) {
		/* A read that failed may have written some of it. */
		queue_log_written(&request->base, request->written, request->status, sizeof(status));
	}
	queue_complete(&request->base, status == BLK_S_OK ? request->written + 1 : 1, request->io.length);
}

static void request_done(struct bdev_io *io, int error)
{
	uint8_t status = BLK_S_OK;

	queue_count_io(&queue_of(request_of(io))->base, io, error);
	if (unlikely(error == -ECANCELED && queue_of(request_of(io))->base.suspending)) {
		queue_leave(&request_of(io)->base);
		return;
	}
	if (unlikely(error != 0)) {
		status = error == -EOPNOTSUPP ? BLK_S_UNSUPP : BLK_S_IOERR;
	}
	finish(request_of(io), status);
}

/* --- framing: header first, status byte last -------------------------------------------------------- */

static bool take_header(struct vq_chain *chain, struct blk_header *header)
{
	if (unlikely(chain->readable_bytes < sizeof(*header))) {
		return false;
	}
	if (likely(chain->iov->iov_len == sizeof(*header))) {
		struct desc_words words = load_desc_words(chain->iov->iov_base);

		memcpy(header, &words, sizeof(*header));
		chain->iov++;
		chain->readable--;
		chain->readable_bytes -= sizeof(*header);
	} else {
		chain_take(chain, header, sizeof(*header));
	}
	return true;
}

/* Cut the status byte off the end of the writable part, which is not empty. */
static uint8_t *cut_status(struct vq_chain *chain)
{
	struct iovec *last = chain_writable(chain) + chain->writable - 1;

	while (last->iov_len == 0) {
		last--;
		chain->writable--;
	}
	last->iov_len--;
	if (last->iov_len == 0) {
		chain->writable--;
	}
	chain->writable_bytes--;
	return (uint8_t *)last->iov_base + last->iov_len;
}

/* --- reading, writing, flushing --------------------------------------------------------------------- */

/* Inlined: see bdev_prefetch(). */
static inline __attribute__((always_inline)) void prefetch(struct bdev_io *io)
{
	if (io->bdev->memory != NULL) {
		bdev_prefetch(io->bdev, io->offset, io->length, io->op == BDEV_WRITE);
		/* It came with the chain, and what was copied since then has driven it out. */
		__builtin_prefetch(request_of(io)->status, 1);
	}
}

/* To be submitted with the others of the batch: see submit(). */
static void keep_ready(struct blk_queue *queue, struct bdev_io *io)
{
	if (queue->ready_count == 0) {
		prefetch(io);
	}
	queue->ready[queue->ready_count++] = io;
}

static void start_io(struct blk_request *request, enum bdev_op op, struct iovec *iov, uint32_t count,
		     uint64_t sector, uint64_t length)
{
	struct bdev_io *io = &request->io;

	io->bdev = queue_of(request)->bdev;
	if (unlikely(io->bdev == NULL || sector >> (64 - SECTOR_SHIFT) != 0)) {
		request_done(io, -EIO);
		return;
	}
	io->iov = iov;
	io->iovcnt = count;
	io->op = op;
	io->offset = sector << SECTOR_SHIFT;
	io->length = length;
	keep_ready(queue_of(request), io);
}

static void start_read(struct blk_request *request, const struct blk_header *header)
{
	const struct vq_chain *chain = &request->base.chain;

	/* The used length has 32 bits and counts the status byte. */
	if (unlikely(chain->writable_bytes >= UINT32_MAX)) {
		finish(request, BLK_S_IOERR);
		return;
	}
	request->written = (uint32_t)chain->writable_bytes;
	start_io(request, BDEV_READ, chain_writable(chain), chain->writable, header->sector,
		 chain->writable_bytes);
}

static void start_write(struct blk_request *request, const struct blk_header *header)
{
	const struct vq_chain *chain = &request->base.chain;

	if (unlikely(queue_of(request)->setup.readonly)) {
		finish(request, BLK_S_IOERR);
		return;
	}
	request->io.flags = queue_of(request)->setup.write_through ? BDEV_IO_FUA : 0;
	start_io(request, BDEV_WRITE, chain->iov, chain->readable, header->sector, chain->readable_bytes);
}

static void answer_id(struct blk_request *request)
{
	request->written =
	    (uint32_t)chain_put(&request->base.chain, queue_of(request)->setup.serial, SERIAL_SIZE);
	finish(request, BLK_S_OK);
}

/* --- discard and write zeroes: one bdev_io after another -------------------------------------------- */

static struct blk_range *ranges_of(const struct blk_request *request)
{
	return ((struct blk_extra *)queue_request_extra(&request->base))->ranges;
}

/* Zeroes count as written, and write zeroes has no FUA: flush. What was discarded may be anything. */
static void end_ranges(struct blk_request *request, int error)
{
	struct bdev_io *io = &request->io;
	bool flush = io->op == BDEV_WRITE_ZEROES && queue_of(request)->setup.write_through;

	io->length = 0;
	if (error != 0 || !flush) {
		request_done(io, error);
		return;
	}
	io->op = BDEV_FLUSH;
	io->offset = 0;
	io->flags = 0;
	io->done = request_done;
	bdev_submit(io);
}

static void next_range(struct bdev_io *io, int error)
{
	struct blk_request *request = request_of(io);
	const struct blk_range *ranges = ranges_of(request);
	const struct blk_range *range;

	queue_count_io(&queue_of(request)->base, io, error);
	/* A range of no sectors is done as it stands. */
	while (request->range < request->ranges && ranges[request->range].num_sectors == 0) {
		request->range++;
	}
	io->bdev = queue_of(request)->bdev;
	if (error != 0 || request->range == request->ranges || io->bdev == NULL) {
		end_ranges(request, error == 0 && io->bdev == NULL ? -ENODEV : error);
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

/* All ranges are checked, on our copy, before the first is carried out. */
static uint8_t take_ranges(struct blk_request *request, enum bdev_op op)
{
	const struct blk_queue *queue = queue_of(request);
	struct vq_chain *chain = &request->base.chain;
	struct blk_range *ranges = ranges_of(request);
	uint64_t count = chain->readable_bytes / sizeof(*ranges);

	if (queue->setup.readonly || chain->readable_bytes % sizeof(*ranges) != 0 || count == 0 ||
	    count > queue->setup.max_discard_segments || count > BLK_MAX_SEGMENTS) {
		return BLK_S_IOERR;
	}
	chain_take(chain, ranges, chain->readable_bytes);
	request->ranges = (uint16_t)count;
	request->range = 0;
	for (uint64_t i = 0; i < count; i++) {
		uint8_t status = check_range(queue, op, &ranges[i]);

		if (status != BLK_S_OK) {
			return status;
		}
	}
	return BLK_S_OK;
}

static void start_ranges(struct blk_request *request, enum bdev_op op, bool negotiated)
{
	uint8_t status = negotiated ? take_ranges(request, op) : BLK_S_UNSUPP;

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

/* --- the device ------------------------------------------------------------------------------------- */

static void start(struct queue_request *base)
{
	struct blk_request *request = (struct blk_request *)base;
	const struct blk_setup *setup = &queue_of(request)->setup;
	struct blk_header header;

	request->written = 0;
	request->status = NULL;
	request->io.length = 0;
	request->io.flags = 0;
	request->io.submitted = 0; /* nothing to be counted yet */
	request->io.done = request_done;
	if (likely(base->chain.writable_bytes > 0)) {
		request->status = cut_status(&base->chain);
	}
	/* Without room for a status, all that the driver can be told is that the request is over. */
	if (unlikely(request->status == NULL || !take_header(&base->chain, &header))) {
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
		start_ranges(request, BDEV_UNMAP, setup->discard);
		break;
	case BLK_T_WRITE_ZEROES:
		start_ranges(request, BDEV_WRITE_ZEROES, setup->write_zeroes);
		break;
	default:
		finish(request, BLK_S_UNSUPP);
	}
}

/*
 * The beginning of the next request is on its way while this one is copied. Not of all of them at once: a core
 * has a dozen line-fill buffers, and the prefetches that find none wait, with nothing being copied.
 */
static void submit(struct queue *base)
{
	struct blk_queue *queue = (struct blk_queue *)base;

	for (uint32_t i = 0; i < queue->ready_count; i++) {
		if (likely(i + 1 < queue->ready_count)) {
			prefetch(queue->ready[i + 1]);
		}
		bdev_submit(queue->ready[i]);
	}
	queue->ready_count = 0;
}

static void abort_request(struct queue_request *request)
{
	(void)bdev_abort(&((struct blk_request *)request)->io); /* or it is waited for */
}

static void free_queue(struct queue *queue)
{
	free(queue);
}

static const struct queue_ops blk_ops = {
    .request_size = sizeof(struct blk_request),
    .extra_size = sizeof(struct blk_extra),
    .frame = {.header = sizeof(struct blk_header), .response = sizeof(uint8_t)},
    .start = start,
    .submit = submit,
    .free = free_queue,
    .abort = abort_request,
};

struct queue *blk_queue_start(struct reactor *reactor, struct guest_memory *memory, struct bdev *bdev,
			      const struct vq_setup *vq, const struct blk_setup *setup)
{
	struct blk_queue *queue = calloc(1, sizeof(*queue));
	int rc;

	if (queue == NULL) {
		errno = ENOMEM;
		return NULL;
	}
	queue->bdev = bdev;
	queue->setup = *setup;
	rc = queue_start(&queue->base, &blk_ops, reactor, memory, vq, setup->slot);
	if (rc < 0) {
		free(queue);
		errno = -rc;
		return NULL;
	}
	return &queue->base;
}

void blk_queue_set_bdev(struct queue *queue, struct bdev *bdev)
{
	((struct blk_queue *)queue)->bdev = bdev;
}
