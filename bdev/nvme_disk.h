/* A namespace of an NVMe controller as a block device. */
#ifndef BDEV_NVME_DISK_H
#define BDEV_NVME_DISK_H

#include "bdev/bdev.h"
#include "bdev/nvme_queue.h"

/* cffi: begin */
struct nvme_disk_setup {
	uint32_t nsid;
	uint32_t block_size;
	uint64_t block_count;
	uint32_t max_transfer; /* bytes a command may move: a multiple of the block size */
	bool readonly;
	bool unmap;	   /* has Dataset Management */
	bool write_zeroes; /* has Write Zeroes; otherwise zeroes are written */
	bool cache;	   /* has a volatile write cache, so that a flush has something to do */
	bool compare;	   /* has Compare */
	bool verify;	   /* has Verify */
	/* Of Copy, in blocks: what a command and a source range of it may have; 0: it has none. */
	uint32_t copy_blocks;
	uint32_t copy_range_blocks;
	uint32_t copy_ranges; /* that a command may have */
};

/* NULL and errno on failure. */
struct bdev *nvme_disk_open(struct reactor *reactor, uint64_t id, uint32_t slot,
			    const struct nvme_disk_setup *disk, const struct nvme_queue_setup *queue);
/* cffi: end */

#endif
