#include "bdev/buffers.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* How many ranges begin at or before @address. */
static uint32_t position(const struct buffers *buffers, uintptr_t address)
{
	uint32_t low = 0, high = buffers->count;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (buffers->ranges[middle].start <= address) {
			low = middle + 1;
		} else {
			high = middle;
		}
	}
	return low;
}

const struct buffer_range *buffers_search(struct buffers *buffers, uintptr_t address, size_t length)
{
	uint32_t place = position(buffers, address);
	const struct buffer_range *range;

	if (place == 0) {
		return NULL;
	}
	range = &buffers->ranges[place - 1];
	if (address - range->start >= range->size || length > range->size - (address - range->start)) {
		return NULL;
	}
	buffers->last = place - 1;
	return range;
}

/* The ring's table, empty: it takes its size once and for all. */
static int make_table(struct buffers *buffers, struct io_uring *ring)
{
	int rc;

	if (buffers->ranges) {
		return 0;
	}
	buffers->ranges = calloc(BUFFERS_MAX, sizeof(*buffers->ranges));
	if (!buffers->ranges) {
		return -ENOMEM;
	}
	rc = io_uring_register_buffers_sparse(ring, BUFFERS_MAX);
	if (rc < 0) {
		buffers_free(buffers);
	}
	return rc;
}

static uint16_t free_place(const struct buffers *buffers)
{
	bool taken[BUFFERS_MAX] = {false};
	uint16_t place = 0;

	for (uint32_t i = 0; i < buffers->count; i++) {
		taken[buffers->ranges[i].place] = true;
	}
	while (taken[place]) {
		place++;
	}
	return place;
}

static int update(struct io_uring *ring, uint16_t place, void *address, size_t size)
{
	const struct iovec iov = {.iov_base = address, .iov_len = size};
	const __u64 tag = 0;
	int rc = io_uring_register_buffers_update_tag(ring, place, &iov, &tag, 1);

	return rc < 0 ? rc : 0;
}

int buffers_add(struct buffers *buffers, struct io_uring *ring, void *address, size_t size)
{
	uintptr_t start = (uintptr_t)address;
	struct buffer_range *range;
	uint16_t free;
	uint32_t place;
	int rc;

	if (size == 0 || size > BUFFERS_MAX_SIZE || start + size < start) {
		return -EINVAL;
	}
	if (buffers->count == BUFFERS_MAX) {
		return -ENOSPC;
	}
	rc = make_table(buffers, ring);
	if (rc < 0) {
		return rc;
	}
	place = position(buffers, start);
	range = &buffers->ranges[place];
	if ((place > 0 && start - range[-1].start < range[-1].size) ||
	    (place < buffers->count && range->start - start < size)) {
		return -EEXIST;
	}
	free = free_place(buffers);
	rc = update(ring, free, address, size);
	if (rc < 0) {
		return rc;
	}
	memmove(range + 1, range, (buffers->count - place) * sizeof(*range));
	*range = (struct buffer_range){.start = start, .size = size, .place = free};
	buffers->count++;
	return 0;
}

int buffers_remove(struct buffers *buffers, struct io_uring *ring, const void *address)
{
	uint32_t place = position(buffers, (uintptr_t)address);
	struct buffer_range *range;

	if (place == 0 || buffers->ranges[place - 1].start != (uintptr_t)address) {
		return -ENOENT;
	}
	range = &buffers->ranges[place - 1];
	update(ring, range->place, NULL, 0);
	buffers->count--;
	buffers->last = 0;
	memmove(range, range + 1, (buffers->count - (place - 1)) * sizeof(*range));
	return 0;
}

void buffers_free(struct buffers *buffers)
{
	free(buffers->ranges);
	buffers->ranges = NULL;
}
