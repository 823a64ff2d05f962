#include "bdev/stacked.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "bdev/detour.h"
#include "bdev/extent.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* Serve those that wait for the pool. What they start may end at once, and bring us here again: one is enough.
 */
static void serve_waiting(struct stacked *stacked)
{
	if (stacked->serving) {
		return;
	}
	stacked->serving = true;
	while (stacked->waiting && stacked->free) {
		struct bdev_io *io = stacked->waiting;

		stacked->waiting = io->next;
		if (!io->next) {
			stacked->waiting_end = &stacked->waiting;
		}
		stacked->resume(&stacked->bdev, io);
	}
	stacked->serving = false;
}

/* The same where the kind has to hear of it, or somebody waits. */
static void end_other(struct stacked *stacked, struct bdev_io *parent, uint32_t tag, int status)
{
	if (stacked->ended) {
		stacked->ended_tag = tag;
		stacked->ended(stacked, parent, status);
	} else {
		bdev_complete(parent, status);
	}
	if (unlikely(stacked->waiting)) {
		serve_waiting(stacked);
	}
}

static void base_done(struct bdev_io *io, int status)
{
	struct stacked_io *child = (struct stacked_io *)io;
	struct stacked *stacked = child->stacked;
	struct bdev_io *parent = child->parent;

	child->parent = NULL;
	child->next = stacked->free;
	stacked->free = child;
	/* Whoever begins to wait only now is served by those that it waits for. */
	if (likely(!stacked->waiting && !stacked->ended)) {
		bdev_complete(parent, status);
	} else {
		end_other(stacked, parent, child->tag, status);
	}
}

/* The pool grows into memory that was reserved with the handle: what is never used takes no memory. */
static struct stacked_io *first_use(struct stacked *stacked)
{
	struct stacked_io *child;

	if (stacked->pool_used == stacked->pool_size) {
		return NULL;
	}
	child = (struct stacked_io *)(stacked->pool + stacked->pool_stride * stacked->pool_used++);
	child->stacked = stacked;
	child->io.done = base_done;
	return child;
}

struct stacked_io *stacked_take(struct stacked *stacked, struct bdev_io *io)
{
	struct stacked_io *child = stacked->free;

	if (likely(child)) {
		stacked->free = child->next;
	} else {
		child = first_use(stacked);
		if (unlikely(!child)) {
			io->next = NULL;
			*stacked->waiting_end = io;
			stacked->waiting_end = &io->next;
			return NULL;
		}
	}
	child->parent = io;
	child->io.op = io->op;
	child->io.flags = io->flags & (BDEV_IO_FUA | BDEV_IO_UNMAP);
	return child;
}

void stacked_forward(struct stacked *stacked, struct bdev_io *io, struct bdev *base, uint64_t offset)
{
	struct stacked_io *child = stacked_take(stacked, io);

	if (likely(child)) {
		child->io.bdev = base;
		child->io.iov = io->iov;
		child->io.iovcnt = io->iovcnt;
		child->io.offset = offset;
		child->io.length = io->length;
		bdev_submit(&child->io);
	}
}

/*
 * Fill in the iovecs for up to @length bytes of @io from byte @skip on. Returns how many bytes they are: whole
 * blocks, 0 if not even one fits.
 */
static uint64_t fill_iovecs(struct stacked_io *child, const struct bdev_io *io, uint64_t skip, uint64_t length,
			    uint32_t block_size)
{
	uint64_t filled = 0, excess;
	uint32_t count = 0;

	for (uint32_t i = 0; i < io->iovcnt && filled < length && count < STACKED_IOVECS; i++) {
		uint64_t part = io->iov[i].iov_len;

		if (skip >= part) {
			skip -= part;
			continue;
		}
		part -= skip;
		if (part > length - filled) {
			part = length - filled;
		}
		child->iov[count++] = (struct iovec){(uint8_t *)io->iov[i].iov_base + skip, part};
		filled += part;
		skip = 0;
	}
	excess = filled & (block_size - 1);
	filled -= excess;
	while (excess && count) {
		struct iovec *last = &child->iov[count - 1];
		uint64_t cut = last->iov_len < excess ? last->iov_len : excess;

		last->iov_len -= cut;
		excess -= cut;
		count -= last->iov_len == 0;
	}
	child->io.iovcnt = count;
	return filled;
}

void stacked_slice(struct stacked_io *child, const struct bdev_io *io, uint64_t skip, uint64_t length)
{
	uint64_t left = io->length - skip;

	if (!skip && length >= left) { /* the usual case: it stays in one piece */
		child->io.iov = io->iov;
		child->io.iovcnt = io->iovcnt;
		child->io.length = left;
		return;
	}
	child->io.iov = child->iov;
	child->io.length =
	    fill_iovecs(child, io, skip, length < left ? length : left, child->stacked->bdev.block_size);
}

int stacked_abort_on_bases(struct stacked *stacked, const struct bdev_io *io)
{
	int rc = -ENOTSUP;

	for (uint32_t i = 0, used = stacked->pool_used; i < used; i++) {
		struct stacked_io *child = (struct stacked_io *)(stacked->pool + stacked->pool_stride * i);

		if (child->parent == io && bdev_abort(&child->io) == 0) {
			rc = 0;
		}
	}
	return rc;
}

int stacked_abort(struct bdev *bdev, struct bdev_io *io)
{
	struct stacked *stacked = (struct stacked *)bdev;

	if (detour_unlink(&stacked->waiting, &stacked->waiting_end, io)) {
		bdev_complete(io, -ECANCELED);
		return 0;
	}
	return stacked_abort_on_bases(stacked, io);
}

int stacked_extent(struct bdev *bdev, uint64_t offset, uint64_t *length)
{
	return bdev_extent(((struct stacked *)bdev)->bases[0], offset, length);
}

static int make_pool(struct stacked *stacked, bool pieces)
{
	size_t iovecs = pieces ? STACKED_IOVECS * sizeof(struct iovec) : 0;

	stacked->pool_size = pieces ? STACKED_PIECES : STACKED_REQUESTS;
	stacked->pool_stride = (sizeof(struct stacked_io) + iovecs + 63) & ~(size_t)63;
	stacked->pool = mmap(NULL, stacked->pool_stride * stacked->pool_size, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return stacked->pool == MAP_FAILED ? -errno : 0;
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
	error = stacked->bases ? make_pool(stacked, setup->pieces) : -ENOMEM;
	if (error) {
		free(stacked->bases);
		free(stacked);
		errno = -error;
		return NULL;
	}
	memcpy(stacked->bases, setup->bases, setup->base_count * sizeof(struct bdev *));
	stacked->base_count = setup->base_count;
	stacked->waiting_end = &stacked->waiting;
	stacked->resume = setup->ops->submit;
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

	munmap(stacked->pool, stacked->pool_stride * stacked->pool_size);
	free(stacked->bases);
	free(stacked);
}
