#include "bdev/detour.h"

#include "bdev/emulate.h"
#include "bdev/qos.h"
#include "bdev/ranges.h"

#define OP(op) (1U << (op))

void detour_update(struct bdev *bdev)
{
	bool special = bdev->removed || bdev->qos || bdev->ranges;

	bdev->direct = special ? 0 : bdev->native & bdev->supported;
}

void detour_past_ranges(struct bdev_io *io)
{
	struct bdev *bdev = io->bdev;

	io->stage = BDEV_STAGE_DEVICE;
	if (OP(io->op) & bdev->native) {
		bdev->ops->submit(bdev, io);
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
	if (io->bdev->qos) {
		io->stage = BDEV_STAGE_LIMITS;
		qos_submit(io->bdev->qos, io);
	} else {
		detour_past_limits(io);
	}
}

void detour_end(struct bdev_io *io)
{
	if (io->bdev->ranges) {
		ranges_end(io->bdev->ranges, io);
	}
}

void detour_submit_part(struct bdev_io *part)
{
	part->epoch = BDEV_MARK_PART;
	part->submitted = reactor_now(part->bdev->reactor);
	part->bdev->ops->submit(part->bdev, part);
}
