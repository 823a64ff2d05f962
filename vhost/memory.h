/*
 * A front-end's memory as one process sees it: regions of guest-physical addresses, each a mapping of a
 * file descriptor that the front-end sent (vhost-user specification, "Memory region description").
 */
#ifndef VHOST_MEMORY_H
#define VHOST_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "reactor/mapping.h"

/* cffi: begin */
struct guest_region {
	uint64_t guest;	 /* guest-physical address of the first byte */
	uint64_t size;	 /* bytes */
	uint64_t user;	 /* the front-end's own virtual address of it */
	uint64_t offset; /* of the first byte in the file */
	int fd;		 /* only read while mapping; stays the caller's */
	uint64_t iova;	 /* where devices see the first byte, see bdev/dma.h; 0: nowhere */
};

struct guest_memory;

/*
 * Map @count regions. NULL and errno: -EINVAL for a region that overlaps, is empty or overflows, or what
 * mmap says. The table holds one reference.
 */
struct guest_memory *guest_memory_create(const struct guest_region *regions, uint32_t count);
void guest_memory_put(struct guest_memory *memory);
/* How many references there are: queues and requests in flight keep one each. */
uint32_t guest_memory_references(const struct guest_memory *memory);
/* The host address of region @index, and its size in bytes; NULL past the last one. */
void *guest_memory_region(const struct guest_memory *memory, uint32_t index, uint64_t *size);
/* True after an access hit a page that its file no longer has (SIGBUS). */
bool guest_memory_lost(const struct guest_memory *memory);
/* cffi: end */

struct mapped_region {
	uint64_t guest;
	uint64_t size;
	uint8_t *host;
	uint64_t user;
	struct mapping mapping;
};

struct guest_memory {
	uint32_t references;
	uint32_t count;
	uint32_t last; /* where the last look-up hit: the next one most likely does too */
	bool lost;
	struct dirty_log *log; /* of a migration (dirty.h), or NULL */
	struct iotlb *iotlb;   /* chains name addresses that it translates (iotlb.h), or NULL */
	struct mapped_region regions[];
};

static inline struct guest_memory *guest_memory_get(struct guest_memory *memory)
{
	memory->references++;
	return memory;
}

/* Slow path of guest_memory_at(). */
void *guest_memory_find(struct guest_memory *memory, uint64_t guest, uint64_t length);

/* The host address of [guest, guest + length) if one region holds all of it, else NULL. */
static inline void *guest_memory_at(struct guest_memory *memory, uint64_t guest, uint64_t length)
{
	const struct mapped_region *region = &memory->regions[memory->last];
	uint64_t offset = guest - region->guest;

	if (__builtin_expect(offset < region->size && length <= region->size - offset, 1)) {
		return region->host + offset;
	}
	return guest_memory_find(memory, guest, length);
}

/*
 * Describe [guest, guest + length) by iovecs, more than one where it crosses from one region into another
 * that follows it. Returns how many, or -EFAULT (outside memory), -ENOBUFS (more than @room).
 */
int guest_memory_iov(struct guest_memory *memory, uint64_t guest, uint64_t length, struct iovec *iov,
		     uint32_t room);

/* The host address of a ring, which the front-end names by its own virtual address; NULL if outside. */
void *guest_memory_at_user(struct guest_memory *memory, uint64_t user, uint64_t length);

#endif
