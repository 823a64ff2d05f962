/*
 * Memory that an io_uring has registered: the kernel has pinned its pages and need not look them up for every
 * operation. A table of ranges by address, each with its place in the ring's table of buffers.
 */
#ifndef BDEV_BUFFERS_H
#define BDEV_BUFFERS_H

#include <liburing.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BUFFERS_MAX 16384	     /* ranges: the kernel's limit */
#define BUFFERS_MAX_SIZE (1UL << 30) /* bytes of one range: the kernel's limit */

struct buffer_range {
	uintptr_t start;
	size_t size;
	uint16_t place; /* in the ring's table */
};

struct buffers {
	struct buffer_range *ranges; /* by address; NULL until there was one */
	uint32_t count;
	uint32_t last; /* where the last look-up hit */
	uint64_t used; /* operations that had their memory here */
};

/*
 * Register [@address, @address + @size). 0; -ENOMEM where RLIMIT_MEMLOCK forbids it; -EFAULT or -EOPNOTSUPP for
 * memory that cannot be pinned; -EINVAL for a size of 0 or over BUFFERS_MAX_SIZE, and where the kernel is too
 * old (5.19 has it); -ENOSPC; -EEXIST for memory that is registered already, or a part of it.
 */
int buffers_add(struct buffers *buffers, struct io_uring *ring, void *address, size_t size);
/* Nothing on it is under way. -ENOENT for what was not registered. */
int buffers_remove(struct buffers *buffers, struct io_uring *ring, const void *address);
void buffers_free(struct buffers *buffers);

/* Slow path of buffers_find(). */
const struct buffer_range *buffers_search(struct buffers *buffers, uintptr_t address, size_t length);

/* The range that holds all of [address, address + length), or NULL. */
static inline const struct buffer_range *buffers_find(struct buffers *buffers, uintptr_t address, size_t length)
{
	const struct buffer_range *range;
	size_t offset;

	if (__builtin_expect(buffers->count == 0, 1)) {
		return NULL;
	}
	range = &buffers->ranges[buffers->last];
	offset = address - range->start;
	if (offset < range->size && length <= range->size - offset) {
		return range;
	}
	return buffers_search(buffers, address, length);
}

#endif
