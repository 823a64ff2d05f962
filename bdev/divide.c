/*
 * Parts are made in the order of their offsets, as many as there are children. When these are used up, the
 * request waits in line and makes one more whenever one comes back, so that large requests take turns. After
 * an error, or a removal, no more are made, and the request ends when those under way have.
 *
 * A block may lie in more buffers than a device takes. It goes by way of a buffer in the place of the part's
 * iovecs then, alone.
 */
#include "bdev/divide.h"

#include <errno.h>
#include <stdlib.h>

#include "bdev/children.h"
#include "bdev/detour.h"
#include "bdev/emulate.h"
#include "bdev/iov.h"

#define OP(op) (1U << (op))
#define HAVE_DATA (OP(BDEV_READ) | OP(BDEV_WRITE) | OP(BDEV_COMPARE))
#define GATHERED 1 /* the tag of a part by way of a buffer */
#define BLOCK_MAX 4096

struct bdev_divider {
	struct bdev_limits limits;
	struct children children;
};

/* How far a request has come; it stands in io->scratch. */
struct progress {
	uint64_t next;	  /* bytes that parts were made for */
	uint32_t pending; /* parts under way, and 1 while parts are being made */
	int32_t status;	  /* of the first that failed */
};

_Static_assert(sizeof(struct progress) <= sizeof(((struct bdev_io *)0)->scratch), "progress fits");
_Static_assert(CHILD_IOVECS * sizeof(struct iovec) >= sizeof(struct iovec) + BLOCK_MAX, "a block has room");
_Static_assert(BDEV_ALL_OPS == sizeof(((struct bdev_limits *)0)->bytes) / sizeof(uint64_t),
	       "one limit an operation");

static struct progress *progress_of(struct bdev_io *io)
{
	return (struct progress *)io->scratch;
}

static uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* A range in a request: bytes from its beginning. */
struct span {
	uint64_t from, to;
};

/* What of @io reaches the device: all of it, but for an UNMAP in whole units. */
static struct span span_of(const struct bdev_limits *limits, const struct bdev_io *io)
{
	uint64_t mask = limits->unmap_unit - 1ULL, end = io->offset + io->length;
	struct span span = {0, io->length};

	if (io->op == BDEV_UNMAP && limits->unmap_unit) {
		span.from = ((io->offset + mask) & ~mask) - io->offset;
		span.to = (end & ~mask) > io->offset + span.from ? (end & ~mask) - io->offset : span.from;
	}
	return span;
}

/* How many bytes the part of @io from byte @skip on may have, of those until @end. */
static uint64_t room(const struct bdev_limits *limits, const struct bdev_io *io, uint64_t skip, uint64_t end)
{
	const struct bdev *bdev = io->bdev;
	uint64_t length = end - skip, offset = io->offset + skip;

	if (limits->bytes[io->op]) {
		length = min_u64(length, limits->bytes[io->op]);
	}
	if (limits->boundary && OP(io->op) & HAVE_DATA) {
		uint64_t here = bdev->ops->room ? bdev->ops->room(bdev, offset)
						: limits->boundary - (offset & (limits->boundary - 1));

		length = min_u64(length, here);
	}
	return length;
}

bool divider_allows(const struct bdev_divider *divider, const struct bdev_io *io)
{
	const struct bdev_limits *limits = &divider->limits;
	struct span span;

	if (OP(io->op) & BDEV_HAVE_NO_RANGE) {
		return true;
	}
	if (OP(io->op) & HAVE_DATA && limits->segments && io->iovcnt > limits->segments) {
		return false;
	}
	span = span_of(limits, io);
	return span.to - span.from == io->length && room(limits, io, 0, io->length) == io->length;
}

/* --- the ends of parts ----------------------------------------------------------------------------------- */

/* One thing less to wait for. */
static void release(struct bdev_io *io)
{
	struct progress *progress = progress_of(io);

	if (--progress->pending == 0) {
		bdev_complete(io, progress->status);
	}
}

/* An error is worse than a difference: nobody knows what is before that then. */
static void take_note(struct bdev_io *io, const struct child_io *part, uint64_t skip, int status)
{
	struct progress *progress = progress_of(io);

	if (status == -EILSEQ) {
		io->miscompare = min_u64(io->miscompare, skip + part->io.miscompare);
	}
	if (!progress->status || (progress->status == -EILSEQ && status != -EILSEQ)) {
		progress->status = status;
	}
}

static void part_ended(struct bdev *bdev, struct bdev_io *io, int status)
{
	const struct child_io *part = bdev->divider->children.last;
	uint64_t skip = part->io.offset - io->offset;

	if (__builtin_expect(status, 0)) {
		take_note(io, part, skip, status);
	} else if (part->tag == GATHERED && io->op == BDEV_READ) {
		iov_copy(io, skip, part->iov->iov_base, part->io.length);
	}
	release(io);
}

/* --- parts ----------------------------------------------------------------------------------------------- */

/* Have a part move one block of its parent, from byte @skip on, by way of a buffer. */
static void gather(struct child_io *part, uint64_t skip, uint32_t block_size)
{
	uint8_t *buffer = (uint8_t *)(part->iov + 1);

	if (part->io.op != BDEV_READ) {
		iov_gather(part->parent, skip, buffer, block_size);
	}
	part->iov[0] = (struct iovec){buffer, block_size};
	part->io.iov = part->iov;
	part->io.iovcnt = 1;
	part->io.length = block_size;
	part->tag = GATHERED;
}

static void make_part(const struct bdev_limits *limits, struct child_io *part, struct span left)
{
	const struct bdev_io *io = part->parent;
	uint64_t skip = left.from, length = room(limits, io, skip, left.to);

	part->tag = 0;
	part->io.bdev = io->bdev;
	part->io.offset = io->offset + skip;
	part->io.length = length;
	part->io.iovcnt = 0;
	part->io.submitted = io->submitted; /* it is as old as the whole */
	part->io.epoch = BDEV_MARK_PART;
	part->io.stage = BDEV_STAGE_DEVICE;
	if (io->op == BDEV_COPY) {
		part->io.source = io->source + skip;
	}
	if (OP(io->op) & HAVE_DATA) {
		uint32_t most = limits->segments ? limits->segments : CHILD_IOVECS;

		child_slice(part, skip, length, most);
		if (__builtin_expect(!part->io.length, 0)) {
			gather(part, skip, io->bdev->block_size);
		}
	}
}

/* Make parts until there are enough, or no more children to be had: then we come back. */
static void go_on(struct bdev *bdev, struct bdev_io *io)
{
	struct bdev_divider *divider = bdev->divider;
	struct progress *progress = progress_of(io);
	uint64_t end = span_of(&divider->limits, io).to;

	if (bdev->removed && !progress->status) {
		progress->status = -ENODEV;
	}
	while (progress->next < end && !progress->status) {
		struct child_io *part = children_take(&divider->children, io);

		if (!part) {
			return;
		}
		make_part(&divider->limits, part, (struct span){progress->next, end});
		progress->next += part->io.length;
		progress->pending++;
		bdev->submit(bdev, &part->io);
	}
	release(io);
}

void divide(struct bdev_io *io)
{
	const struct bdev_limits *limits = &io->bdev->divider->limits;

	if (io->op == BDEV_COPY && io->offset < io->source + io->length &&
	    io->source < io->offset + io->length) {
		emulate(io); /* parts of ranges that overlap have an order */
		return;
	}
	if (io->op == BDEV_COMPARE) {
		io->miscompare = UINT64_MAX;
	}
	io->stage = BDEV_STAGE_DIVIDED;
	*progress_of(io) = (struct progress){.next = span_of(limits, io).from, .pending = 1};
	go_on(io->bdev, io);
}

int divide_abort(struct bdev_divider *divider, struct bdev_io *io)
{
	struct progress *progress = progress_of(io);
	bool waits = detour_unlink(&divider->children.waiting, &divider->children.waiting_end, io);
	int rc;

	progress->pending += waits ? 0 : 1; /* so that it does not end while its parts are looked for */
	rc = children_abort(&divider->children, io);
	if (waits && !progress->status) {
		progress->status = -ECANCELED;
	}
	release(io);
	return waits ? 0 : rc;
}

/* --- life ------------------------------------------------------------------------------------------------ */

static bool is_power_of_two(uint64_t value)
{
	return !(value & (value - 1));
}

static bool are_possible(const struct bdev *bdev, const struct bdev_limits *limits)
{
	uint64_t odd = limits->boundary | limits->unmap_unit;

	for (unsigned op = 0; op < BDEV_ALL_OPS; op++) {
		odd |= limits->bytes[op];
	}
	if (limits->unmap_unit && limits->bytes[BDEV_UNMAP] & (limits->unmap_unit - 1)) {
		return false;
	}
	return !(odd & (bdev->block_size - 1)) && is_power_of_two(limits->boundary) &&
	       is_power_of_two(limits->unmap_unit) && limits->segments <= CHILD_IOVECS &&
	       bdev->block_size <= BLOCK_MAX;
}

/*
 * What bdev_submit() looks at: a request that is surely within all limits. With a boundary that is one that
 * stays between multiples of the boundary, or of the largest power of two that is shorter than all limits.
 */
static void set_easy(struct bdev *bdev, const struct bdev_limits *limits)
{
	uint64_t most = BDEV_EASY;

	for (unsigned op = 0; op < BDEV_OPS; op++) {
		if (limits->bytes[op]) {
			most = min_u64(most, limits->bytes[op]);
		}
	}
	bdev->easy_mask = 0;
	if (limits->boundary) {
		most = min_u64(1ULL << (63 - __builtin_clzll(most)), limits->boundary);
		bdev->easy_mask = most - 1;
	}
	bdev->easy_length = most;
	bdev->easy_segments = limits->segments ? limits->segments : UINT32_MAX;
	bdev->limited = most != BDEV_EASY || limits->segments;
}

int bdev_set_limits(struct bdev *bdev, const struct bdev_limits *limits)
{
	struct bdev_divider *divider;
	int rc;

	if (bdev->divider || !are_possible(bdev, limits)) {
		return -EINVAL;
	}
	divider = calloc(1, sizeof(*divider));
	if (!divider) {
		return -ENOMEM;
	}
	rc = children_init(&divider->children, bdev, true, go_on);
	if (rc) {
		free(divider);
		return rc;
	}
	divider->limits = *limits;
	divider->children.ended = part_ended;
	bdev->divider = divider;
	set_easy(bdev, limits);
	detour_update(bdev);
	return 0;
}

uint32_t divider_looks_at(const struct bdev_divider *divider)
{
	return divider->limits.unmap_unit ? OP(BDEV_UNMAP) : 0;
}

void divider_free(struct bdev_divider *divider)
{
	if (divider) {
		children_free(&divider->children);
		free(divider);
	}
}
