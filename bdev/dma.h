/*
 * Memory of this process that devices can reach by DMA: ranges of its addresses, and where devices see
 * them. The control process maps the memory itself (bdev/vfio.py) into the one address space that all
 * devices share, and tells a reactor; a range is told before its first use and forgotten after its last.
 */
#ifndef BDEV_DMA_H
#define BDEV_DMA_H

#include <stdbool.h>
#include <stdint.h>

/* cffi: begin */
/* 0, -EINVAL if it is empty, wraps around, or overlaps another; or -ENOMEM. */
int dma_range_add(void *address, uint64_t size, uint64_t iova);
/* Forget the range that begins at @address; a no-op if there is none. */
void dma_range_remove(void *address);
/* cffi: end */

struct dma_range {
	uintptr_t address;
	uint64_t size;
	uint64_t iova;
};

extern struct dma_range dma_last; /* where the last look-up hit: the next one most likely does too */

bool dma_find(uintptr_t address, uint64_t length) __attribute__((noinline, cold));

/* Where devices see [@address, @address + @length), if that is where the last look-up hit. */
static inline bool dma_translate_near(const void *address, uint64_t length, uint64_t *iova)
{
	uint64_t offset = (uintptr_t)address - dma_last.address;

	*iova = dma_last.iova + offset;
	return __builtin_expect(offset < dma_last.size && length <= dma_last.size - offset, 1);
}

/* The same wherever it is; false if it is not in one range. */
static inline bool dma_translate(const void *address, uint64_t length, uint64_t *iova)
{
	return dma_translate_near(address, length, iova) ||
	       (dma_find((uintptr_t)address, length) && dma_translate_near(address, length, iova));
}

#endif
