#include "vhost/memory.h"

#include <errno.h>
#include <stdlib.h>

#include "bdev/dma.h"
#include "vhost/dirty.h"
#include "vhost/iotlb.h"

/* --- mapping ---------------------------------------------------------------------------------------- */

static bool region_is_sane(const struct guest_region *region)
{
	return region->size != 0 && region->guest + region->size > region->guest &&
	       region->user + region->size > region->user && region->offset + region->size > region->offset &&
	       region->offset + region->size <= INT64_MAX;
}

static bool regions_overlap(const struct guest_region *a, const struct guest_region *b)
{
	return a->guest < b->guest + b->size && b->guest < a->guest + a->size;
}

static bool table_is_sane(const struct guest_region *regions, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		if (!region_is_sane(&regions[i])) {
			return false;
		}
		for (uint32_t j = 0; j < i; j++) {
			if (regions_overlap(&regions[i], &regions[j])) {
				return false;
			}
		}
	}
	return true;
}

static int map_region(struct guest_memory *memory, struct mapped_region *mapped,
		      const struct guest_region *region)
{
	int rc = mapping_create(&mapped->mapping, region->fd, region->offset, region->size, &memory->lost);

	if (rc == 0 && region->iova != 0) {
		rc = dma_range_add(mapped->mapping.data, region->size, region->iova);
		if (rc < 0) {
			mapping_destroy(&mapped->mapping);
		}
	}
	mapped->guest = region->guest;
	mapped->size = region->size;
	mapped->user = region->user;
	mapped->host = mapped->mapping.data;
	return rc;
}

static void destroy(struct guest_memory *memory)
{
	for (uint32_t i = 0; i < memory->count; i++) {
		dma_range_remove(memory->regions[i].host);
		mapping_destroy(&memory->regions[i].mapping);
	}
	dirty_log_free(memory->log);
	iotlb_free(memory->iotlb);
	free(memory);
}

struct guest_memory *guest_memory_create(const struct guest_region *regions, uint32_t count)
{
	struct guest_memory *memory;

	if (count == 0 || !table_is_sane(regions, count)) {
		errno = EINVAL;
		return NULL;
	}
	memory = calloc(1, sizeof(*memory) + count * sizeof(memory->regions[0]));
	if (memory == NULL) {
		errno = ENOMEM;
		return NULL;
	}
	memory->references = 1;
	for (memory->count = 0; memory->count < count; memory->count++) {
		int rc = map_region(memory, &memory->regions[memory->count], &regions[memory->count]);

		if (rc < 0) {
			destroy(memory);
			errno = -rc;
			return NULL;
		}
	}
	return memory;
}

void guest_memory_put(struct guest_memory *memory)
{
	if (--memory->references == 0) {
		destroy(memory);
	}
}

uint32_t guest_memory_references(const struct guest_memory *memory)
{
	return memory->references;
}

void *guest_memory_region(const struct guest_memory *memory, uint32_t index, uint64_t *size)
{
	if (index >= memory->count) {
		return NULL;
	}
	*size = memory->regions[index].size;
	return memory->regions[index].host;
}

bool guest_memory_lost(const struct guest_memory *memory)
{
	return __atomic_load_n(&memory->lost, __ATOMIC_RELAXED);
}

/* --- translation ------------------------------------------------------------------------------------ */

void *guest_memory_find(struct guest_memory *memory, uint64_t guest, uint64_t length)
{
	for (uint32_t i = 0; i < memory->count; i++) {
		const struct mapped_region *region = &memory->regions[i];
		uint64_t offset = guest - region->guest;

		if (offset < region->size && length <= region->size - offset) {
			memory->last = i;
			return region->host + offset;
		}
	}
	return NULL;
}

static const struct mapped_region *region_of(struct guest_memory *memory, uint64_t guest)
{
	for (uint32_t i = 0; i < memory->count; i++) {
		if (guest - memory->regions[i].guest < memory->regions[i].size) {
			memory->last = i;
			return &memory->regions[i];
		}
	}
	return NULL;
}

int guest_memory_iov(struct guest_memory *memory, uint64_t guest, uint64_t length, struct iovec *iov,
		     uint32_t room)
{
	uint32_t n = 0;

	if (guest + length < guest) {
		return -EFAULT;
	}
	while (length > 0) {
		const struct mapped_region *region = region_of(memory, guest);
		uint64_t offset, part;

		if (region == NULL) {
			return -EFAULT;
		}
		if (n == room) {
			return -ENOBUFS;
		}
		offset = guest - region->guest;
		part = region->size - offset < length ? region->size - offset : length;
		iov[n].iov_base = region->host + offset;
		iov[n].iov_len = part;
		n++;
		guest += part;
		length -= part;
	}
	return (int)n;
}

void *guest_memory_at_user(struct guest_memory *memory, uint64_t user, uint64_t length)
{
	for (uint32_t i = 0; i < memory->count; i++) {
		const struct mapped_region *region = &memory->regions[i];
		uint64_t offset = user - region->user;

		if (offset < region->size && length <= region->size - offset) {
			return region->host + offset;
		}
	}
	return NULL;
}
