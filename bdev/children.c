#include "bdev/children.h"

#include <errno.h>
#include <sys/mman.h>

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

#define PAGE 4096
/* Whole cache lines, room for two children; no divisor of a page, so that all lines of one are used. */
#define COLOUR 448

/* Serve those that wait. What they start may end at once, and bring us here again: one is enough. */
static void serve_waiting(struct children *children)
{
	if (children->serving) {
		return;
	}
	children->serving = true;
	while (children->waiting && children->free) {
		struct bdev_io *parent = children->waiting;

		children->waiting = parent->next;
		if (!parent->next) {
			children->waiting_end = &children->waiting;
		}
		children->resume(children->bdev, parent);
	}
	children->serving = false;
}

/* Back to the pool; returns whose it was. */
static inline struct bdev_io *put(struct children *children, struct child_io *child)
{
	struct bdev_io *parent = child->parent;

	child->next = children->free;
	children->free = child;
	return parent;
}

/* The end where somebody waits; apart, so that the usual way needs no frame. */
__attribute__((noinline)) static void end_and_serve(struct children *children, struct bdev_io *parent,
						    int status)
{
	bdev_complete(parent, status);
	serve_waiting(children);
}

static void child_done(struct bdev_io *io, int status)
{
	struct child_io *child = (struct child_io *)io;
	struct children *children = child->pool;
	struct bdev_io *parent = put(children, child);

	/* Whoever begins to wait only now is served by those that it waits for. */
	if (likely(!children->waiting)) {
		bdev_complete(parent, status);
	} else {
		end_and_serve(children, parent, status);
	}
}

/* The same where the user wants to hear of it. */
static void child_done_heard(struct bdev_io *io, int status)
{
	struct child_io *child = (struct child_io *)io;
	struct children *children = child->pool;
	struct bdev_io *parent = put(children, child);

	children->last = child;
	children->ended(children->bdev, parent, status);
	if (unlikely(children->waiting)) {
		serve_waiting(children);
	}
}

static struct child_io *child_at(const struct children *children, uint32_t index)
{
	return (struct child_io *)(children->memory + children->stride * index);
}

struct child_io *children_take_new(struct children *children, struct bdev_io *parent)
{
	struct child_io *child;

	if (children->used == children->size) {
		parent->next = NULL;
		*children->waiting_end = parent;
		children->waiting_end = &parent->next;
		return NULL;
	}
	child = child_at(children, children->used++);
	child->pool = children;
	child->io.done = children->ended ? child_done_heard : child_done;
	return child;
}

/*
 * Fill in iovecs for up to @length bytes of the parent from byte @skip on. Returns how many bytes they are:
 * whole blocks, 0 if not even one fits.
 */
static uint64_t fill_iovecs(struct child_io *child, uint64_t skip, uint64_t length, uint32_t iovecs)
{
	const struct bdev_io *io = child->parent;
	uint64_t filled = 0, excess;
	uint32_t count = 0;

	for (uint32_t i = 0; i < io->iovcnt && filled < length && count < iovecs; i++) {
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
	excess = filled & (child->pool->bdev->block_size - 1);
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

void child_slice(struct child_io *child, uint64_t skip, uint64_t length, uint32_t iovecs)
{
	const struct bdev_io *io = child->parent;
	uint64_t left = io->length - skip;

	if (!skip && length >= left && iovecs >= io->iovcnt) { /* it stays in one piece */
		child->io.iov = io->iov;
		child->io.iovcnt = io->iovcnt;
		child->io.length = left;
		return;
	}
	child->io.iov = child->iov;
	child->io.length = fill_iovecs(child, skip, length < left ? length : left, iovecs);
}

int children_abort(struct children *children, const struct bdev_io *parent)
{
	int rc = -ENOTSUP;

	for (uint32_t i = 0, used = children->used; i < used; i++) {
		struct child_io *child = child_at(children, i);

		if (child->parent == parent && bdev_abort(&child->io) == 0) {
			rc = 0;
		}
	}
	return rc;
}

static size_t mapped_size(const struct children *children)
{
	return children->stride * children->size + PAGE;
}

/*
 * Where in its first page a pool begins: each elsewhere. The first children are those in use, and the same
 * place in all pages is the same place in the cache; the CPU also takes a load for one of what was stored last
 * at that place of any page, until it knows better.
 */
static size_t next_colour(void)
{
	static size_t colour;

	colour = (colour + COLOUR) % PAGE;
	return colour;
}

int children_init(struct children *children, struct bdev *bdev, bool iovecs,
		  void (*resume)(struct bdev *bdev, struct bdev_io *parent))
{
	size_t size = sizeof(struct child_io) + (iovecs ? CHILD_IOVECS * sizeof(struct iovec) : 0);
	void *memory;

	*children = (struct children){
	    .bdev = bdev,
	    .resume = resume,
	    .size = iovecs ? CHILDREN_WITH_IOVECS : CHILDREN,
	    .stride = (size + 63) & ~(size_t)63,
	};
	children->waiting_end = &children->waiting;
	/* Address space: what is never used takes no memory. */
	memory = mmap(NULL, mapped_size(children), PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED) {
		return -errno;
	}
	children->memory = (uint8_t *)memory + next_colour();
	return 0;
}

void children_free(struct children *children)
{
	munmap((void *)((uintptr_t)children->memory & ~(uintptr_t)(PAGE - 1)), mapped_size(children));
}
