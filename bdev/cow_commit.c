#include <errno.h>

#include "bdev/cow_copy.h"

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

static void write_blocks(struct cow_bdev *cow);

static void fail_commit(struct cow_bdev *cow, int status)
{
	struct cow_copy *copy = cow->committing, *next;

	cow->committing = NULL;
	for (; copy; copy = next) {
		next = copy->next;
		cow_copy_fail(copy, status);
	}
}

static void flushed(struct bdev_io *io, int status)
{
	struct cow_bdev *cow = container_of(io, struct cow_bdev, commit);

	if (status) {
		fail_commit(cow, status);
		return;
	}
	for (struct cow_copy *copy = cow->committing; copy; copy = copy->next) {
		for (uint64_t i = 0; i < copy->count; i++) {
			__atomic_fetch_or(cow_map_claim(cow->map, copy->first + i), COW_READY,
					  __ATOMIC_RELEASE);
		}
	}
	write_blocks(cow);
}

/* The bits of all copies in this block are on the overlay. */
static void settle(struct cow_bdev *cow)
{
	struct cow_copy **link = &cow->committing, *settled = NULL, *next;

	while (*link) {
		struct cow_copy *copy = *link;

		if (cow_map_block_of(cow->map, copy->first) == cow->block) {
			cow_map_settle(cow->map, copy->first, copy->count);
			*link = copy->next;
			copy->next = settled;
			settled = copy;
		} else {
			link = &copy->next;
		}
	}
	/* Only now: whoever writes this block next must find the bits. */
	owned_release(cow_map_lock(cow->map, cow->block));
	for (struct cow_copy *copy = settled; copy; copy = next) {
		next = copy->next;
		cow_copy_end(copy, 0);
	}
}

static void block_written(struct bdev_io *io, int status)
{
	struct cow_bdev *cow = container_of(io, struct cow_bdev, commit);

	if (status) {
		owned_release(cow_map_lock(cow->map, cow->block));
		fail_commit(cow, status);
		return;
	}
	settle(cow);
	write_blocks(cow);
}

static bool wants_durable(const struct cow_bdev *cow)
{
	for (const struct cow_copy *copy = cow->committing; copy; copy = copy->next) {
		if (copy->request && copy->request->op != BDEV_READ && (copy->request->flags & BDEV_IO_FUA)) {
			return true;
		}
	}
	return false;
}

/* Write the map's blocks one after another; come back when another reactor is at one of them. */
static void write_blocks(struct cow_bdev *cow)
{
	uint32_t block_size = cow->map->layout.block_size;

	if (!cow->committing) {
		if (cow->written) {
			cow_defer(cow);
		}
		return;
	}
	cow->block = cow_map_block_of(cow->map, cow->committing->first);
	if (!owned_take(cow_map_lock(cow->map, cow->block), cow->owner)) {
		cow->blocked = cow_look_again(cow);
		if (!cow->blocked) {
			fail_commit(cow, -ENOMEM);
		}
		return;
	}
	cow_map_image(cow->map, cow->block, cow->image);
	cow->commit_iov = (struct iovec){cow->image, block_size};
	cow->commit = (struct bdev_io){
	    .bdev = cow->overlay,
	    .done = block_written,
	    .op = BDEV_WRITE,
	    .flags = wants_durable(cow) ? BDEV_IO_FUA : 0,
	    .iov = &cow->commit_iov,
	    .iovcnt = 1,
	    .offset = cow->map->layout.map_offset + cow->block * block_size,
	    .length = block_size,
	};
	bdev_submit(&cow->commit);
}

static void begin_commit(struct cow_bdev *cow)
{
	cow->committing = cow->written;
	cow->written = NULL;
	cow->commit = (struct bdev_io){.bdev = cow->overlay, .done = flushed, .op = BDEV_FLUSH};
	bdev_submit(&cow->commit);
}

void cow_commit(struct cow_bdev *cow)
{
	if (cow->blocked && !cow->retry.place) {
		cow->blocked = false;
		write_blocks(cow);
	}
	if (cow->written && !cow->committing) {
		begin_commit(cow);
	}
}
