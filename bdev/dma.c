#include "bdev/dma.h"

#include <errno.h>
#include <stdlib.h>

/* One reactor is one thread and one process: no lock. A guest has a few regions, so a list will do. */
static struct dma_range *ranges;
static uint32_t count, room;

struct dma_range dma_last;

int dma_range_add(void *address, uint64_t size, uint64_t iova)
{
	uintptr_t start = (uintptr_t)address;

	if (size == 0 || start + size < start || iova + size < iova) {
		return -EINVAL;
	}
	for (uint32_t i = 0; i < count; i++) {
		if (start < ranges[i].address + ranges[i].size && ranges[i].address < start + size) {
			return -EINVAL;
		}
	}
	if (count == room) {
		uint32_t larger = room ? room * 2 : 16;
		struct dma_range *grown = realloc(ranges, larger * sizeof(*grown));

		if (!grown) {
			return -ENOMEM;
		}
		ranges = grown;
		room = larger;
	}
	ranges[count++] = (struct dma_range){.address = start, .size = size, .iova = iova};
	return 0;
}

void dma_range_remove(void *address)
{
	for (uint32_t i = 0; i < count; i++) {
		if (ranges[i].address == (uintptr_t)address) {
			ranges[i] = ranges[--count];
			break;
		}
	}
	if (dma_last.address == (uintptr_t)address) {
		dma_last = (struct dma_range){0};
	}
}

bool dma_find(uintptr_t address, uint64_t length)
{
	for (uint32_t i = 0; i < count; i++) {
		uint64_t offset = address - ranges[i].address;

		if (offset < ranges[i].size && length <= ranges[i].size - offset) {
			dma_last = ranges[i];
			return true;
		}
	}
	return false;
}
