#include "bdev/stacked.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bdev/detour.h"
#include "bdev/extent.h"

#define likely(x) __builtin_expect(!!(x), 1)

void stacked_forward(struct stacked *stacked, struct bdev_io *io, struct bdev *base, uint64_t offset)
{
	struct child_io *child = children_take(&stacked->children, io);

	if (likely(child)) {
		child->io.bdev = base;
		child->io.iov = io->iov;
		child->io.offset = offset;
		child->io.length = io->length;
		bdev_submit_checked(&child->io);
	}
}

int stacked_abort(struct bdev *bdev, struct bdev_io *io)
{
	struct stacked *stacked = (struct stacked *)bdev;

	if (detour_unlink(&stacked->children.waiting, &stacked->children.waiting_end, io)) {
		bdev_complete(io, -ECANCELED);
		return 0;
	}
	return children_abort(&stacked->children, io);
}

int stacked_extent(struct bdev *bdev, uint64_t offset, uint64_t *length)
{
	return bdev_extent(((struct stacked *)bdev)->base, offset, length);
}

/* What all bases have; the rest is made of that here, not there. */
static void inherit(struct bdev *bdev, struct bdev *const *bases, uint32_t count)
{
	uint32_t native = bdev->native;
	bool readonly = false;

	for (uint32_t i = 0; i < count; i++) {
		native &= bases[i]->supported | 1U << BDEV_RESET;
		readonly |= bases[i]->readonly;
	}
	bdev_set_supported(bdev, native, readonly);
}

void *stacked_create(size_t size, const struct stacked_setup *setup)
{
	const uint32_t all = BDEV_DEVICE_OPS;
	struct stacked *stacked = calloc(1, size);
	int error;

	if (!stacked) {
		return NULL;
	}
	stacked->bases = calloc(setup->base_count, sizeof(struct bdev *));
	error = stacked->bases
		    ? children_init(&stacked->children, &stacked->bdev, setup->pieces, setup->ops->submit)
		    : -ENOMEM;
	if (error) {
		free(stacked->bases);
		free(stacked);
		errno = -error;
		return NULL;
	}
	memcpy(stacked->bases, setup->bases, setup->base_count * sizeof(struct bdev *));
	stacked->base = setup->bases[0];
	stacked->base_count = setup->base_count;
	bdev_init(&stacked->bdev, setup->ops, setup->reactor, setup->id, setup->slot, setup->block_size,
		  setup->block_count, all, false);
	inherit(&stacked->bdev, setup->bases, setup->base_count);
	return stacked;
}

void *stacked_over(size_t size, struct bdev *base, const struct bdev_ops *ops, uint64_t id, uint32_t slot,
		   uint64_t block_count)
{
	struct stacked_setup setup = {
	    .reactor = base->reactor,
	    .ops = ops,
	    .id = id,
	    .slot = slot,
	    .block_size = base->block_size,
	    .block_count = block_count,
	    .bases = &base,
	    .base_count = 1,
	};

	return stacked_create(size, &setup);
}

void stacked_close(struct bdev *bdev)
{
	struct stacked *stacked = (struct stacked *)bdev;

	children_free(&stacked->children);
	free(stacked->bases);
	free(stacked);
}
