#include "bdev/null.h"

#include <stdlib.h>

static void null_submit(struct bdev *bdev, struct bdev_io *io)
{
	bdev_complete(io, 0);
}

static void null_close(struct bdev *bdev)
{
	free(bdev);
}

static const struct bdev_ops null_ops = {
    .submit = null_submit,
    .close = null_close,
};

struct bdev *null_bdev_open(struct reactor *reactor, uint64_t id, uint32_t slot, uint32_t block_size,
			    uint64_t block_count)
{
	const uint32_t all = BDEV_DEVICE_OPS;
	struct bdev *bdev = malloc(sizeof(*bdev));

	if (bdev) {
		bdev_init(bdev, &null_ops, reactor, id, slot, block_size, block_count, all, false);
	}
	return bdev;
}
