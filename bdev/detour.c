#include "bdev/detour.h"

#include <errno.h>

#include "bdev/divide.h"
#include "bdev/emulate.h"
#include "bdev/qos.h"
#include "bdev/ranges.h"
#include "bdev/watch.h"

#define OP(op) (1U << (op))

void detour_update(struct bdev *bdev)
{
	bdev->plain =
	    bdev->removed ? 0 : bdev->native & bdev->supported & BDEV_DEVICE_OPS & ~BDEV_HAVE_NO_RANGE;
	if (bdev->divider) {
		bdev->plain &= ~divider_looks_at(bdev->divider);
	}
	bdev->direct = bdev->qos || bdev->watch ? 0 : bdev->plain;
	bdev->guarded = bdev->ranges ? bdev->direct & RANGE_WRITERS : 0;
	bdev->direct &= ~bdev->guarded;
}

/* To the device, which knows the operation: as it is, or in parts that are within the limits. */
static void to_device(struct bdev_io *io)
{
	struct bdev *bdev = io->bdev;

	if (bdev->divider && !divider_allows(bdev->divider, io)) {
		divide(io);
	} else {
		io->stage = BDEV_STAGE_DEVICE;
		bdev->ops->submit(bdev, io);
	}
}

void detour_past_ranges(struct bdev_io *io)
{
	if (OP(io->op) & io->bdev->native) {
		to_device(io);
	} else {
		emulate(io);
	}
}

void detour_past_limits(struct bdev_io *io)
{
	if (io->bdev->ranges) {
		io->stage = BDEV_STAGE_RANGE;
		ranges_submit(io->bdev->ranges, io);
	} else {
		detour_past_ranges(io);
	}
}

void detour_start(struct bdev_io *io)
{
	if (io->bdev->watch) {
		watch_begin(io->bdev->watch, io);
	}
	if (io->bdev->qos) {
		io->stage = BDEV_STAGE_LIMITS;
		qos_submit(io->bdev->qos, io);
	} else {
		detour_past_limits(io);
	}
}

void detour_end(struct bdev_io *io, int status)
{
	if (io->epoch & BDEV_MARK_WATCHED) {
		watch_end(io->bdev->watch, io, status);
	}
	if (io->bdev->ranges) {
		ranges_end(io->bdev->ranges, io);
	}
}

bool detour_unlink(struct bdev_io **first, struct bdev_io ***end, struct bdev_io *io)
{
	for (struct bdev_io **link = first; *link; link = &(*link)->next) {
		if (*link == io) {
			*link = io->next;
			if (!*link) {
				*end = link;
			}
			return true;
		}
	}
	return false;
}

int bdev_abort(struct bdev_io *io)
{
	struct bdev *bdev = io->bdev;

	switch (io->stage) {
	case BDEV_STAGE_LIMITS:
		return qos_abort(bdev->qos, io);
	case BDEV_STAGE_RANGE:
		return ranges_abort(bdev->ranges, io);
	case BDEV_STAGE_PARTS:
		return emulate_abort(bdev->emulator, io);
	case BDEV_STAGE_DIVIDED:
		return divide_abort(bdev->divider, io);
	default:
		return bdev->ops->abort ? bdev->ops->abort(bdev, io) : -ENOTSUP;
	}
}

void detour_submit_part(struct bdev_io *part)
{
	part->epoch = BDEV_MARK_PART;
	part->submitted = reactor_now(part->bdev->reactor);
	to_device(part);
}
