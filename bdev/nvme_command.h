/* The commands that a request of a namespace becomes, most often one. */
#ifndef BDEV_NVME_COMMAND_H
#define BDEV_NVME_COMMAND_H

#include "bdev/nvme_queue.h"

#define NVME_BLOCKS_MAX 65536 /* a command's count of blocks has 16 bits, of its blocks less 1 */

struct nvme_disk {
	struct bdev bdev;
	struct nvme_queue *queue;
	uint32_t nsid;
	uint32_t block_shift;
	uint64_t plain; /* bytes that submit_plain() may take */
	bool write_zeroes;
	bool cache;
	uint32_t copy_range_blocks;
};

static inline uint32_t nvme_fua(const struct bdev_io *io)
{
	return io->op == BDEV_WRITE && (io->flags & BDEV_IO_FUA) ? NVME_RW_FUA : 0;
}

/*
 * Fill in the command of a free slot: what comes after the first slot->offset bytes of @io, or as much of it as
 * a command may have. Returns how many bytes (1 for a flush, which has none), or 0 if no bounce buffer is
 * there.
 */
uint64_t nvme_prepare(const struct nvme_disk *disk, struct nvme_slot *slot, const struct bdev_io *io);
/* The command has ended: its buffers are free again. */
void nvme_put_buffers(struct nvme_queue *queue, const struct nvme_slot *slot);

#endif
