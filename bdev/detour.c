#include "bdev/detour.h"

#include <errno.h>

#include "bdev/emulate.h"
#include "bdev/qos.h"
#include "bdev/ranges.h"
#include "bdev/watch.h"

#define OP(op) (1U << (op))

void detour_update(struct bdev *bdev)
{
	uint32_t direct = bdev->native & bdev->supported & ~BDEV_HAVE_NO_RANGE;

	if (bdev->removed || bdev->qos || bdev->watch) {
		direct = 0;
	} else if (bdev->ranges) {
		direct &= ~RANGE_WRITERS;
	}
	bdev->direct = direct;
}

void detour_past_ranges(struct bdev_io *io)
{
	struct bdev *bdev = io->bdev;

	io->stage = BDEV_STAGE_DEVICE;
	if (OP(io->op) & bdev->native) {
		bdev->ops->submit(bdev, io);
	} else {
		io->stage = BDEV_STAGE_PARTS;
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
	default:
		return bdev->ops->abort ? bdev->ops->abort(bdev, io) : -ENOTSUP;
	}
}

void detour_submit_part(struct bdev_io *part)
{
	part->epoch = BDEV_MARK_PART;
	part->submitted = reactor_now(part->bdev->reactor);
	part->bdev->ops->submit(part->bdev, part);
}
