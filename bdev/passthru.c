/*
 * The smallest stacked device, to copy from. A kind of its own would look at the request in submit(), or set
 * children.ended to look at its end; bdev/stacked.h and bdev/children.h have what there is to draw on.
 */
#include "bdev/passthru.h"

#include "bdev/stacked.h"

static void passthru_submit(struct bdev *bdev, struct bdev_io *io)
{
	struct stacked *stacked = (struct stacked *)bdev;

	if (io->op == BDEV_RESET) {
		/* All that came before is over once nothing of it is in flight here, and so at the base. */
		bdev_complete_when_quiet(io);
		return;
	}
	stacked_forward(stacked, io, stacked->base, io->offset);
}

static const struct bdev_ops passthru_ops = {
    .submit = passthru_submit,
    .abort = stacked_abort,
    .extent = stacked_extent,
    .close = stacked_close,
};

struct bdev *passthru_bdev_open(uint64_t id, uint32_t slot, uint64_t block_count, struct bdev *base)
{
	struct stacked *stacked = stacked_over(sizeof(*stacked), base, &passthru_ops, id, slot, block_count);

	if (!stacked) {
		return NULL;
	}
	stacked->bdev.memory = base->memory; /* for bdev_prefetch() */
	stacked->bdev.sparse = base->sparse;
	return &stacked->bdev;
}
