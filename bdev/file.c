#include "bdev/file.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "bdev/divide.h"
#include "bdev/extent.h"
#include "bdev/fence.h"
#include "bdev/transfer.h"

struct file_bdev {
	struct bdev bdev;
	struct transfer_file file;
	int fd;
};

static void file_submit(struct bdev *bdev, struct bdev_io *io)
{
	if (io->op == BDEV_RESET) {
		bdev_complete_when_quiet(io);
	} else {
		transfer_start(&((struct file_bdev *)bdev)->file, io);
	}
}

static int file_abort(struct bdev *bdev, struct bdev_io *io)
{
	return io->op == BDEV_RESET ? -ENOTSUP : transfer_abort(&((struct file_bdev *)bdev)->file, io);
}

static int file_extent(struct bdev *bdev, uint64_t offset, uint64_t *length)
{
	return extent_of_file(bdev, ((struct file_bdev *)bdev)->fd, offset, length);
}

static void file_close(struct bdev *bdev)
{
	struct file_bdev *disk = (struct file_bdev *)bdev;

	engine_remove_file(disk->file.engine, &disk->file);
	engine_put(disk->file.engine);
	close(disk->fd);
	free(disk);
}

static const struct bdev_ops file_ops = {
    .submit = file_submit,
    .abort = file_abort,
    .extent = file_extent,
    .close = file_close,
};

/* Of one system call: UIO_MAXIOV buffers, and a little less than 2 GiB. */
static const struct bdev_limits limits = {
    .bytes = {[BDEV_READ] = 1U << 30, [BDEV_WRITE] = 1U << 30},
    .segments = 1024,
};

struct bdev *file_bdev_open(struct reactor *reactor, uint64_t id, uint32_t slot, const struct file_setup *setup)
{
	uint32_t supported = BDEV_DEVICE_OPS;
	struct file_bdev *disk = calloc(1, sizeof(*disk));
	struct engine *engine;
	int error;

	if (!disk) {
		return NULL;
	}
	engine = engine_get(reactor, setup->engine);
	if (!engine) {
		error = errno;
		free(disk);
		errno = error;
		return NULL;
	}
	if (!setup->unmap) {
		supported &= ~(1U << BDEV_UNMAP);
	}
	bdev_init(&disk->bdev, &file_ops, reactor, id, slot, setup->block_size, setup->block_count, supported,
		  setup->readonly);
	disk->bdev.sparse = true;
	disk->fd = setup->fd;
	disk->file.memory_alignment = setup->memory_alignment;
	disk->file.offset_alignment = setup->offset_alignment;
	disk->file.punch_hole = setup->unmap;
	disk->file.zero_range = true;
	error = bdev_set_limits(&disk->bdev, &limits);
	if (error) {
		engine_put(engine);
		free(disk);
		errno = -error;
		return NULL;
	}
	engine_add_file(engine, &disk->file, disk->fd);
	return &disk->bdev;
}

int file_fence(struct reactor *reactor)
{
	return fence_find(reactor);
}

int file_buffer_add(struct reactor *reactor, void *address, uint64_t size)
{
	return engine_add_buffer(reactor, address, size);
}

int file_buffer_remove(struct reactor *reactor, void *address)
{
	return engine_remove_buffer(reactor, address);
}

uint64_t file_buffer_uses(struct reactor *reactor)
{
	return engine_buffer_uses(reactor);
}
