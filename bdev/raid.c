/*
 * Requests with data stay on one base: that is the limit which the layer divides them by. What has no data is
 * one request a base, because a contiguous range of a stripe set is a contiguous range of each of its bases.
 */
#include "bdev/raid.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bdev/divide.h"
#include "bdev/stacked.h"

#define unlikely(x) __builtin_expect(!!(x), 0)

struct raid_bdev {
	struct stacked stacked;
	uint64_t strip; /* bytes; 0: concat */
	unsigned strip_shift;
	uint64_t *start; /* concat: where base i begins, bytes, and in start[count] where the last one ends */
};

/* How far a request without data has come; it stands in io->scratch. */
struct progress {
	uint64_t next;	  /* bases that were asked */
	uint32_t pending; /* requests on them, and 1 while more are being made */
	int32_t status;	  /* of the first that failed */
};

_Static_assert(sizeof(struct progress) <= sizeof(((struct bdev_io *)0)->scratch), "progress fits");

static struct progress *progress_of(struct bdev_io *io)
{
	return (struct progress *)io->scratch;
}

/* A range of one base. */
struct extent {
	uint32_t base;
	uint64_t offset;
	uint64_t length;
};

/* The base that has byte @offset of a concatenation. */
static uint32_t find_base(const struct raid_bdev *raid, uint64_t offset)
{
	uint32_t low = 0, high = raid->stacked.base_count - 1;

	while (low < high) {
		uint32_t middle = (low + high + 1) / 2;

		if (raid->start[middle] <= offset) {
			low = middle;
		} else {
			high = middle - 1;
		}
	}
	return low;
}

/* Where byte @offset is, and how much follows it there. */
static struct extent locate(const struct raid_bdev *raid, uint64_t offset)
{
	struct extent extent;

	if (raid->strip) {
		uint64_t strip = offset >> raid->strip_shift, within = offset & (raid->strip - 1);

		extent.base = (uint32_t)(strip % raid->stacked.base_count);
		extent.offset = (strip / raid->stacked.base_count << raid->strip_shift) + within;
		extent.length = raid->strip - within;
	} else {
		extent.base = find_base(raid, offset);
		extent.offset = offset - raid->start[extent.base];
		extent.length = raid->start[extent.base + 1] - offset;
	}
	return extent;
}

/* Up to which byte base @base has something of the first @end bytes of a stripe set. */
static uint64_t strip_end(const struct raid_bdev *raid, uint32_t base, uint64_t end)
{
	uint64_t strips = end >> raid->strip_shift, count = raid->stacked.base_count;
	uint64_t whole = strips / count, more = strips % count;

	if (base < more) {
		return (whole + 1) << raid->strip_shift;
	}
	return (whole << raid->strip_shift) + (base == more ? end & (raid->strip - 1) : 0);
}

/* What base @base has of a range; length 0 if nothing. */
static struct extent part_of(const struct raid_bdev *raid, uint32_t base, uint64_t from, uint64_t to)
{
	struct extent extent = {.base = base};

	if (raid->strip) {
		extent.offset = strip_end(raid, base, from);
		extent.length = strip_end(raid, base, to) - extent.offset;
	} else {
		uint64_t start = raid->start[base], end = raid->start[base + 1];

		from = from > start ? from : start;
		to = to < end ? to : end;
		if (from < to) {
			extent.offset = from - start;
			extent.length = to - from;
		}
	}
	return extent;
}

static bool has_data(const struct bdev_io *io)
{
	return io->op == BDEV_READ || io->op == BDEV_WRITE;
}

static void base_ended(struct bdev *bdev, struct bdev_io *io, int status)
{
	struct progress *progress = progress_of(io);

	(void)bdev;
	if (has_data(io)) {
		bdev_complete(io, status);
		return;
	}
	if (unlikely(status && !progress->status)) {
		progress->status = status;
	}
	if (--progress->pending == 0) {
		bdev_complete(io, progress->status);
	}
}

static uint64_t raid_room(const struct bdev *bdev, uint64_t offset)
{
	return locate((const struct raid_bdev *)bdev, offset).length;
}

static void forward(struct raid_bdev *raid, struct bdev_io *io)
{
	struct extent extent = locate(raid, io->offset);

	stacked_forward(&raid->stacked, io, raid->stacked.bases[extent.base], extent.offset);
}

/* Ask one base after the other, until no more requests on them are to be had: then we come back. */
static void ask_all(struct raid_bdev *raid, struct bdev_io *io)
{
	struct progress *progress = progress_of(io);

	for (; progress->next < raid->stacked.base_count; progress->next++) {
		struct extent extent = {.base = (uint32_t)progress->next};
		struct child_io *child;

		if (io->op != BDEV_FLUSH) {
			extent = part_of(raid, extent.base, io->offset, io->offset + io->length);
			if (!extent.length) {
				continue;
			}
		}
		child = children_take(&raid->stacked.children, io);
		if (!child) {
			return;
		}
		child->io.bdev = raid->stacked.bases[extent.base];
		child->io.iovcnt = 0;
		child->io.offset = extent.offset;
		child->io.length = extent.length;
		progress->pending++;
		bdev_submit(&child->io);
	}
	base_ended(&raid->stacked.bdev, io, 0);
}

/* Begin, or go on when the pool has something again. */
static void go_on(struct bdev *bdev, struct bdev_io *io)
{
	if (has_data(io)) {
		forward((struct raid_bdev *)bdev, io);
	} else {
		ask_all((struct raid_bdev *)bdev, io);
	}
}

static void raid_submit(struct bdev *bdev, struct bdev_io *io)
{
	if (io->op == BDEV_RESET) {
		bdev_complete_when_quiet(io);
		return;
	}
	*progress_of(io) = (struct progress){.pending = 1};
	go_on(bdev, io);
}

/* Bases that were not asked yet will not be; it ends when the others have. */
static int raid_abort(struct bdev *bdev, struct bdev_io *io)
{
	struct stacked *stacked = (struct stacked *)bdev;
	struct progress *progress = progress_of(io);
	bool left = progress->next < stacked->base_count;

	if (io->op == BDEV_RESET) {
		return -ENOTSUP;
	}
	if (has_data(io)) {
		return stacked_abort(bdev, io);
	}
	if (left) {
		progress->next = stacked->base_count;
		progress->status = progress->status ? progress->status : -ECANCELED;
	}
	return children_abort(&stacked->children, io) == 0 || left ? 0 : -ENOTSUP;
}

static void raid_close(struct bdev *bdev)
{
	free(((struct raid_bdev *)bdev)->start);
	stacked_close(bdev);
}

static const struct bdev_ops raid_ops = {
    .submit = raid_submit,
    .abort = raid_abort,
    .room = raid_room,
    .close = raid_close,
};

/* Data stays on one base. Concat: what surely does is looked for by the power of two in all starts. */
static int set_limits(struct raid_bdev *raid)
{
	struct bdev_limits limits = {.boundary = raid->strip};
	uint64_t starts = 0;

	for (uint32_t i = 1; i < raid->stacked.base_count; i++) {
		starts |= raid->start[i];
	}
	if (!raid->strip && starts) {
		limits.boundary = starts & -starts;
	}
	return bdev_set_limits(&raid->stacked.bdev, &limits);
}

struct bdev *raid_bdev_open(struct reactor *reactor, uint64_t id, uint32_t slot, const struct raid_setup *setup)
{
	struct stacked_setup stacked = {
	    .reactor = reactor,
	    .ops = &raid_ops,
	    .id = id,
	    .slot = slot,
	    .block_size = setup->bases[0]->block_size,
	    .bases = setup->bases,
	    .base_count = setup->base_count,
	};
	uint64_t *start = calloc(setup->base_count + 1, sizeof(uint64_t));
	struct raid_bdev *raid;
	int error;

	if (!start) {
		return NULL;
	}
	for (uint32_t i = 0; i < setup->base_count; i++) {
		stacked.block_count += setup->base_blocks[i];
		start[i + 1] = stacked.block_count * stacked.block_size;
	}
	raid = stacked_create(sizeof(*raid), &stacked);
	if (!raid) {
		error = errno;
		free(start);
		errno = error;
		return NULL;
	}
	raid->stacked.children.resume = go_on;
	raid->stacked.children.ended = base_ended;
	raid->start = start;
	raid->strip = (uint64_t)setup->strip_blocks * stacked.block_size;
	raid->strip_shift = raid->strip ? (unsigned)__builtin_ctzll(raid->strip) : 0;
	error = set_limits(raid);
	if (error) {
		raid_close(&raid->stacked.bdev);
		errno = -error;
		return NULL;
	}
	return &raid->stacked.bdev;
}
