/*
 * Cluster i of the disk is at one place in the overlay, or only in the base. So a request on clusters that are
 * all in the overlay goes straight down, in one piece, at another offset: what there is to decide is which bits
 * of the map are set. A write to others first has their clusters brought there (bdev/cow_copy.h), with its own
 * data in them. What is discarded or zeroed becomes a hole of the overlay.
 */
#include "bdev/cow.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "bdev/cow_copy.h"
#include "bdev/divide.h"
#include "bdev/iov.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

static uint64_t first_cluster(const struct cow_bdev *cow, const struct bdev_io *io)
{
	return io->offset >> cow->cluster_shift;
}

static uint64_t end_cluster(const struct cow_bdev *cow, const struct bdev_io *io)
{
	return ((io->offset + io->length - 1) >> cow->cluster_shift) + 1;
}

/*
 * Leave out the clusters at both ends of a discarded range that are not in the overlay: they keep their
 * contents, and somebody may be copying them there at this moment.
 */
static void trim(const struct cow_bdev *cow, const struct bdev_io *io, uint64_t *offset, uint64_t *end)
{
	uint64_t first = first_cluster(cow, io), last = end_cluster(cow, io) - 1;

	if (!cow_map_has(cow->map, first)) {
		*offset = (first + 1) << cow->cluster_shift;
	}
	if (!cow_map_has(cow->map, last)) {
		*end = last << cow->cluster_shift;
	}
}

/* Have the overlay carry out @io as it is. */
static void forward(struct cow_bdev *cow, struct bdev_io *io)
{
	struct cow_progress *progress = cow_progress_of(io);
	uint64_t offset = io->offset, end = io->offset + io->length;
	struct child_io *child;

	*progress = (struct cow_progress){.phase = COW_FORWARD, .pending = 1};
	if (unlikely(io->op == BDEV_UNMAP)) {
		trim(cow, io, &offset, &end);
		if (offset >= end) {
			bdev_complete(io, 0);
			return;
		}
	}
	child = children_take(&cow->stacked.children, io);
	if (unlikely(!child)) {
		return;
	}
	if (io->op == BDEV_UNMAP) { /* of a cluster that the guest discarded the base must not shine through */
		child->io.op = BDEV_WRITE_ZEROES;
		child->io.flags |= BDEV_IO_UNMAP;
	}
	child->io.bdev = cow->overlay;
	child->io.iov = io->iov;
	child->io.offset = offset + cow->map->layout.data_offset;
	child->io.length = end - offset;
	bdev_submit(&child->io);
}

/* Read pieces of base and overlay until there are enough, or no more requests to be had: then we come back. */
static void read_pieces(struct cow_bdev *cow, struct bdev_io *io)
{
	struct cow_progress *progress = cow_progress_of(io);

	while (progress->next < io->length) {
		uint64_t offset = io->offset + progress->next, end = io->offset + io->length;
		uint64_t cluster = offset >> cow->cluster_shift;
		bool present = cow_map_has(cow->map, cluster);
		uint64_t run = cow_map_find(cow->map, cluster, end_cluster(cow, io), !present);
		struct child_io *child;

		run <<= cow->cluster_shift;
		run = run < end ? run : end;
		if (!present && offset >= cow->base_size) {
			iov_zero(io, progress->next, run - offset);
			progress->next += run - offset;
			continue;
		}
		if (!present && run > cow->base_size) {
			run = cow->base_size;
		}
		child = children_take(&cow->stacked.children, io);
		if (!child) {
			return;
		}
		child->io.bdev = present ? cow->overlay : cow->base;
		child->io.offset = present ? offset + cow->map->layout.data_offset : offset;
		child_slice(child, progress->next, run - offset, CHILD_IOVECS);
		progress->pending++;
		progress->next += child->io.length;
		bdev_submit(&child->io);
	}
	cow_ended(&cow->stacked.bdev, io, 0);
}

static void begin_read(struct cow_bdev *cow, struct bdev_io *io)
{
	*cow_progress_of(io) = (struct cow_progress){.phase = COW_READ, .pending = 1};
	read_pieces(cow, io);
}

/* Whether a cluster that is not in the overlay can stay so: there is nothing to be hidden, or no need to hide
 * it. */
static bool can_stay(const struct cow_bdev *cow, const struct bdev_io *io, uint64_t cluster)
{
	uint64_t start = cluster << cow->cluster_shift, end = start + cow->map->layout.cluster_size;

	if (end > cow->stacked.bdev.size) {
		end = cow->stacked.bdev.size;
	}
	if (io->op == BDEV_UNMAP && (io->offset > start || io->offset + io->length < end)) {
		return true; /* a discarded part of a cluster keeps its contents */
	}
	return start >= cow->base_size && io->op != BDEV_WRITE;
}

/* Bring all clusters that a request needs to the overlay. */
static void ensure(struct cow_bdev *cow, struct bdev_io *io)
{
	struct cow_progress *progress = cow_progress_of(io);
	uint64_t first = first_cluster(cow, io), end = end_cluster(cow, io);

	while (first + progress->next < end) {
		uint64_t cluster = first + progress->next, count = end - cluster;

		if (cow_map_has(cow->map, cluster)) {
			progress->forward = 1;
			progress->next = cow_map_find(cow->map, cluster, end, false) - first;
			continue;
		}
		if (can_stay(cow, io, cluster)) {
			progress->next++;
			continue;
		}
		switch (cow_copy_start(cow, io, cluster, &count)) {
		case COW_STARTED:
			progress->next += count;
			break;
		case COW_THERE:
			break;
		case COW_WAITS:
			return;
		case COW_FAILED:
			progress->status = -ENOMEM;
			end = cluster;
			break;
		}
	}
	cow_ended(&cow->stacked.bdev, io, 0);
}

void cow_resume(struct bdev *bdev, struct bdev_io *io)
{
	struct cow_bdev *cow = (struct cow_bdev *)bdev;

	switch (cow_progress_of(io)->phase) {
	case COW_ENSURE:
		ensure(cow, io);
		break;
	case COW_READ:
		read_pieces(cow, io);
		break;
	default:
		forward(cow, io);
		break;
	}
}

void cow_ended(struct bdev *bdev, struct bdev_io *io, int status)
{
	struct cow_bdev *cow = (struct cow_bdev *)bdev;
	struct cow_progress *progress = cow_progress_of(io);

	if (unlikely(status && !progress->status)) {
		progress->status = status;
	}
	if (--progress->pending) {
		return;
	}
	if (progress->phase != COW_ENSURE) {
		bdev_complete(io, progress->status);
	} else if (io->op == BDEV_READ) {
		begin_read(cow, io); /* from the base what could not be copied */
	} else if (progress->status || !progress->forward) {
		bdev_complete(io, progress->status);
	} else {
		forward(cow, io);
	}
}

static void cow_submit(struct bdev *bdev, struct bdev_io *io)
{
	struct cow_bdev *cow = (struct cow_bdev *)bdev;
	uint64_t end;

	if (io->op == BDEV_RESET) {
		bdev_complete_when_quiet(io);
		return;
	}
	if (io->op == BDEV_FLUSH) {
		forward(cow, io);
		return;
	}
	end = end_cluster(cow, io);
	if (likely(cow_map_find(cow->map, first_cluster(cow, io), end, false) == end)) {
		forward(cow, io);
	} else if (io->op == BDEV_READ && !cow->copy_on_read) {
		begin_read(cow, io);
	} else {
		*cow_progress_of(io) = (struct cow_progress){.phase = COW_ENSURE, .pending = 1};
		ensure(cow, io);
	}
}

static void cow_close(struct bdev *bdev)
{
	struct cow_bdev *cow = (struct cow_bdev *)bdev;

	cow_copies_free(cow);
	munmap(cow->map, cow->map_size);
	stacked_close(bdev);
}

static const struct bdev_ops cow_ops = {
    .submit = cow_submit,
    .close = cow_close,
};

static int map_overlay(struct cow_bdev *cow, int fd)
{
	struct cow_map *map = mmap(NULL, sizeof(*map), PROT_READ, MAP_SHARED, fd, 0);

	if (map == MAP_FAILED) {
		return -errno;
	}
	cow->map_size = cow_map_size(&map->layout);
	munmap(map, sizeof(*map));
	map = mmap(NULL, cow->map_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED) {
		return -errno;
	}
	cow->map = map;
	cow->cluster_shift = (unsigned)__builtin_ctz(map->layout.cluster_size);
	return 0;
}

struct bdev *cow_bdev_open(uint64_t id, uint32_t slot, const struct cow_setup *setup)
{
	struct bdev *bases[] = {setup->base, setup->overlay};
	struct stacked_setup stacked = {
	    .reactor = setup->base->reactor,
	    .ops = &cow_ops,
	    .id = id,
	    .slot = slot,
	    .block_size = setup->base->block_size,
	    .block_count = setup->block_count,
	    .bases = bases,
	    .base_count = 2,
	    .pieces = true,
	};
	struct bdev_limits limits = {.segments = CHILD_IOVECS}; /* so that any slice has room in a child */
	struct cow_bdev *cow = stacked_create(sizeof(*cow), &stacked);
	int error;

	if (!cow) {
		return NULL;
	}
	/* It is the overlay that is written; discarding is up to us. */
	bdev_set_supported(&cow->stacked.bdev,
			   (setup->overlay->supported & BDEV_DEVICE_OPS) | 1U << BDEV_UNMAP | 1U << BDEV_RESET,
			   false);
	cow->stacked.children.resume = cow_resume;
	cow->stacked.children.ended = cow_ended;
	cow->base = setup->base;
	cow->overlay = setup->overlay;
	cow->base_size = setup->base_blocks * stacked.block_size;
	cow->owner = setup->owner;
	cow->copy_on_read = setup->copy_on_read;
	error = map_overlay(cow, setup->map_fd);
	if (!error) {
		error = cow_copies_init(cow);
		if (error) {
			munmap(cow->map, cow->map_size);
		}
	}
	if (!error) {
		error = bdev_set_limits(&cow->stacked.bdev, &limits);
		if (error) {
			cow_copies_free(cow);
			munmap(cow->map, cow->map_size);
		}
	}
	if (error) {
		stacked_close(&cow->stacked.bdev);
		errno = -error;
		return NULL;
	}
	return &cow->stacked.bdev;
}
