#include "bdev/collapse.h"

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* younger than Debian 12's C library */
#endif

/* The extents that contain no hole, from @first on: [*first, *end). False when there are no more. */
static bool next_full(int fd, uint64_t *first, uint64_t *end, uint64_t count)
{
	while (*first < count) {
		off_t data = lseek(fd, (off_t)(*first * COLLAPSE_EXTENT), SEEK_DATA);
		off_t hole;

		if (data < 0) {
			return false;
		}
		*first = ((uint64_t)data + COLLAPSE_EXTENT - 1) / COLLAPSE_EXTENT;
		hole = lseek(fd, data, SEEK_HOLE);
		if (hole < 0) {
			return false;
		}
		*end = (uint64_t)hole / COLLAPSE_EXTENT;
		if (*end > *first) {
			return true;
		}
		*first = ((uint64_t)hole + COLLAPSE_EXTENT - 1) / COLLAPSE_EXTENT;
	}
	return false;
}

/* An address where an extent can be mapped as one huge page, in a reservation of two. */
static uint8_t *reserve(void **space)
{
	*space = mmap(NULL, 2 * COLLAPSE_EXTENT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (*space == MAP_FAILED) {
		return NULL;
	}
	return (uint8_t *)(((uintptr_t)*space + COLLAPSE_EXTENT - 1) & ~(uintptr_t)(COLLAPSE_EXTENT - 1));
}

static int collapse_extent(int fd, uint8_t *window, uint64_t extent)
{
	void *map = mmap(window, COLLAPSE_EXTENT, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd,
			 (off_t)(extent * COLLAPSE_EXTENT));

	if (map == MAP_FAILED) {
		return -errno;
	}
	return madvise(map, COLLAPSE_EXTENT, MADV_COLLAPSE) ? -errno : 0;
}

int collapse_memory(int fd, uint8_t *done, uint64_t count, int most)
{
	uint64_t first = 0, end = 0;
	int collapsed = 0;
	void *space;
	uint8_t *window = reserve(&space);

	if (window == NULL) {
		return -errno;
	}
	for (uint64_t seen = 0; collapsed < most; seen = first = end) {
		if (!next_full(fd, &first, &end, count)) {
			memset(done + seen, 0, count - seen);
			break;
		}
		end = end < count ? end : count;
		memset(done + seen, 0, first - seen);
		for (uint64_t i = first; i < end && collapsed < most; i++) {
			int rc = done[i] ? 0 : collapse_extent(fd, window, i);

			if (rc == -EINVAL) { /* the kernel does not know of it, or was built without */
				munmap(space, 2 * COLLAPSE_EXTENT);
				return rc;
			}
			/* Anything else (no huge page is free, a page is pinned) may be better another time. */
			collapsed += rc == 0 && !done[i];
			done[i] = rc == 0;
		}
	}
	munmap(space, 2 * COLLAPSE_EXTENT);
	return collapsed;
}
