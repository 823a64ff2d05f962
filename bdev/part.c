#include "bdev/part.h"

#include "bdev/extent.h"
#include "bdev/stacked.h"

struct part_bdev {
	struct stacked stacked;
	uint64_t start; /* bytes */
};

/* What reaches the base is inside the part: bdev_submit() has checked it against our size. */
static void part_submit(struct bdev *bdev, struct bdev_io *io)
{
	struct part_bdev *part = (struct part_bdev *)bdev;

	if (io->op == BDEV_RESET) {
		bdev_complete_when_quiet(io);
		return;
	}
	stacked_forward(&part->stacked, io, part->stacked.base,
			io->op == BDEV_FLUSH ? 0 : part->start + io->offset);
}

static int part_extent(struct bdev *bdev, uint64_t offset, uint64_t *length)
{
	struct part_bdev *part = (struct part_bdev *)bdev;

	return bdev_extent(part->stacked.base, part->start + offset, length);
}

static const struct bdev_ops part_ops = {
    .submit = part_submit,
    .abort = stacked_abort,
    .extent = part_extent,
    .close = stacked_close,
};

struct bdev *part_bdev_open(uint64_t id, uint32_t slot, uint64_t first_block, uint64_t block_count,
			    struct bdev *base)
{
	struct part_bdev *part = stacked_over(sizeof(*part), base, &part_ops, id, slot, block_count);

	if (!part) {
		return NULL;
	}
	part->start = first_block * base->block_size;
	part->stacked.bdev.sparse = base->sparse;
	if (base->memory) {
		part->stacked.bdev.memory = base->memory + part->start; /* for bdev_prefetch() */
	}
	return &part->stacked.bdev;
}
