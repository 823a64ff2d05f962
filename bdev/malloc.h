/*
 * A block device of memory: a memfd of the control process, which every reactor that serves it maps. So the
 * contents outlive any reactor, and reactors that serve one disk see one memory.
 */
#ifndef BDEV_MALLOC_H
#define BDEV_MALLOC_H

#include "bdev/bdev.h"

/* cffi: begin */
/*
 * @fd: a memfd of block_count blocks or more, sealed against shrinking; stays the caller's.
 * @page_size: 0, or the size of its pages if they are of hugetlbfs: such memory is reserved for good, and
 * unmapped ranges are zeroed rather than given back.
 * NULL and errno on failure.
 */
struct bdev *malloc_bdev_open(struct reactor *reactor, uint64_t id, uint32_t slot, uint32_t block_size,
			      uint64_t block_count, int fd, uint64_t page_size);
/* Give the memory of a memfd back from byte @from on, whoever has it mapped: 0 or -errno. */
int malloc_bdev_discard(int fd, uint64_t from);
/* cffi: end */

#endif
