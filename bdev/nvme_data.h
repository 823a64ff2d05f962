/* Telling an NVMe controller where a command's data is: PRP entries and SGL descriptors. */
#ifndef BDEV_NVME_DATA_H
#define BDEV_NVME_DATA_H

#include <stdbool.h>
#include <stdint.h>

#include "bdev/bdev.h"
#include "bdev/nvme_spec.h"

#define NVME_MORE_PAGES 16

/*
 * Memory for entries that do not fit into a command, ours and as the device sees it: a page, and
 * NVME_MORE_PAGES pages in one piece for what does not fit there either. A description that cannot have these
 * is shorter.
 */
struct nvme_list {
	void *page;
	uint64_t iova;
	void *more; /* NULL: there is none */
	uint64_t more_iova;
	bool more_used; /* set by those below */
};

/*
 * Describe the data of @io from byte @skip on, up to @limit bytes, in place. Returns how many bytes, a
 * multiple of @block; 0 where not even a block can be described: memory that the device does not see, or
 * that does not follow the rules.
 *
 * PRPs (Base 4.1.1): all but the first begin at a page, all but the last end at one.
 */
uint32_t nvme_describe_prps(struct nvme_command *command, const struct bdev_io *io, uint64_t skip,
			    uint32_t limit, uint32_t block, struct nvme_list *list);
/* SGLs (Base 4.1.2): any pieces whose addresses and lengths are multiples of @alignment. */
uint32_t nvme_describe_sgls(struct nvme_command *command, const struct bdev_io *io, uint64_t skip,
			    uint32_t limit, uint32_t block, uint32_t alignment, struct nvme_list *list);
/* @length bytes, up to 1 MiB, at one address, a multiple of four. */
void nvme_describe_one(struct nvme_command *command, uint64_t iova, uint32_t length, struct nvme_list *list);

#endif
