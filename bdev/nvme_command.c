/*
 * From requests to commands. The memory of a command is described in place where the device can reach it there;
 * otherwise a part of the request goes by way of a bounce buffer, and so does memory so scattered that it would
 * take many small commands.
 */
#include "bdev/nvme_command.h"

#include <string.h>

#include "bdev/iov.h"
#include "bdev/nvme_data.h"

#define DIRECT_MIN (32U << 10) /* a part in place that is shorter costs more than a copy of all */

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

_Static_assert(NVME_BOUNCE_SIZE == NVME_MORE_PAGES * NVME_PAGE_SIZE, "a bounce buffer holds what lists do not");

static uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static void begin_command(const struct nvme_disk *disk, struct nvme_slot *slot, uint8_t opcode)
{
	slot->command = (struct nvme_command){.opcode = opcode, .nsid = disk->nsid};
	slot->bounce = slot->more = NVME_NO_BOUNCE;
}

/* Fill in which blocks a command concerns: @length bytes from where the request has come to. */
static void set_range(const struct nvme_disk *disk, struct nvme_slot *slot, const struct bdev_io *io,
		      uint64_t length)
{
	uint64_t first = (io->offset + slot->offset) >> disk->block_shift;

	slot->command.cdw10 = (uint32_t)first;
	slot->command.cdw11 = (uint32_t)(first >> 32);
	slot->command.cdw12 |= (uint32_t)(length >> disk->block_shift) - 1;
	slot->length = (uint32_t)length;
}

/* A part of the request by way of a bounce buffer; 0 if there is none at the moment. */
static uint32_t bounce(struct nvme_queue *queue, struct nvme_slot *slot, const struct bdev_io *io,
		       uint32_t limit)
{
	uint32_t length = (uint32_t)min_u64(limit, NVME_BOUNCE_SIZE);
	struct nvme_list list = nvme_slot_list(queue, slot);

	if (!queue->bounce_count) {
		return 0;
	}
	slot->bounce = queue->bounce_free[--queue->bounce_count];
	if (io->op != BDEV_READ) {
		iov_gather(io, slot->offset, nvme_bounce(queue, slot->bounce), length);
	}
	nvme_describe_one(&slot->command, nvme_bounce_iova(queue, slot->bounce), length, &list);
	queue->watch->bounced++;
	return length;
}

/* As much of the request as can be described in place, or 0. */
static uint32_t describe(const struct nvme_disk *disk, struct nvme_slot *slot, const struct bdev_io *io,
			 uint32_t limit)
{
	struct nvme_queue *queue = disk->queue;
	struct nvme_list list = nvme_slot_list(queue, slot);
	uint32_t block = disk->bdev.block_size, length;

	if (queue->bounce_count) {
		uint16_t top = queue->bounce_free[queue->bounce_count - 1];

		list.more = nvme_bounce(queue, top);
		list.more_iova = nvme_bounce_iova(queue, top);
	}
	length = nvme_describe_prps(&slot->command, io, slot->offset, limit, block, &list);
	if (unlikely(length < limit && queue->sgl)) {
		length = nvme_describe_sgls(&slot->command, io, slot->offset, limit, block, queue->sgl, &list);
	}
	if (length < limit && length < DIRECT_MIN) {
		return 0;
	}
	if (unlikely(list.more_used)) {
		slot->more = queue->bounce_free[--queue->bounce_count];
	}
	return length;
}

/* Returns the bytes that the command will move, 0 if it has to wait. */
static uint64_t prepare_transfer(const struct nvme_disk *disk, struct nvme_slot *slot, const struct bdev_io *io,
				 enum nvme_opcode opcode)
{
	struct nvme_queue *queue = disk->queue;
	uint32_t limit = (uint32_t)(io->length - slot->offset); /* all of it is within max_transfer */
	uint32_t length = 0;

	begin_command(disk, slot, opcode);
	slot->command.cdw12 = nvme_fua(io);
	if (likely(queue->direct)) {
		length = describe(disk, slot, io, limit);
	}
	if (unlikely(!length)) {
		slot->command.flags = 0;
		length = bounce(queue, slot, io, limit);
	}
	if (likely(length)) {
		set_range(disk, slot, io, length);
	}
	return length;
}

static uint64_t prepare_flush(const struct nvme_disk *disk, struct nvme_slot *slot)
{
	begin_command(disk, slot, NVME_FLUSH);
	return 1; /* not a byte, but all that there is to do */
}

/*
 * All but transfers are one command: the disk's limits are those of commands (nvme_disk.c). An UNMAP has one
 * range: ranges of one request that are apart come as requests of their own.
 */
static uint64_t prepare_unmap(const struct nvme_disk *disk, struct nvme_slot *slot, const struct bdev_io *io)
{
	struct nvme_list list = nvme_slot_list(disk->queue, slot);

	begin_command(disk, slot, NVME_DATASET_MANAGEMENT);
	*(struct nvme_range *)list.page = (struct nvme_range){
	    .blocks = (uint32_t)(io->length >> disk->block_shift),
	    .first = io->offset >> disk->block_shift,
	};
	slot->command.prp1 = list.iova;
	slot->command.cdw11 = NVME_DSM_DEALLOCATE;
	return io->length;
}

static uint64_t prepare_zeroes(const struct nvme_disk *disk, struct nvme_slot *slot, const struct bdev_io *io)
{
	const struct nvme_queue *queue = disk->queue;
	struct nvme_list list = nvme_slot_list(queue, slot);

	if (disk->write_zeroes) {
		begin_command(disk, slot, NVME_WRITE_ZEROES);
		slot->command.cdw12 = io->flags & BDEV_IO_UNMAP ? NVME_ZEROES_DEALLOCATE : 0;
	} else {
		begin_command(disk, slot, NVME_WRITE);
		nvme_describe_one(&slot->command, queue->iova + queue->layout.zeroes, (uint32_t)io->length,
				  &list);
	}
	set_range(disk, slot, io, io->length);
	return io->length;
}

static uint64_t prepare_verify(const struct nvme_disk *disk, struct nvme_slot *slot, const struct bdev_io *io)
{
	begin_command(disk, slot, NVME_VERIFY);
	set_range(disk, slot, io, io->length);
	return io->length;
}

/* The source ranges lie one after the other; a command may have as many as it takes. */
static uint64_t prepare_copy(const struct nvme_disk *disk, struct nvme_slot *slot, const struct bdev_io *io)
{
	struct nvme_list list = nvme_slot_list(disk->queue, slot);
	struct nvme_source *sources = list.page;
	uint64_t first = io->source >> disk->block_shift, blocks = io->length >> disk->block_shift;
	uint32_t count = 0;

	for (uint64_t done = 0; done < blocks; count++) {
		uint64_t here = min_u64(blocks - done, disk->copy_range_blocks);

		sources[count] = (struct nvme_source){.first = first + done, .blocks = (uint16_t)(here - 1)};
		done += here;
	}
	begin_command(disk, slot, NVME_COPY);
	set_range(disk, slot, io, io->length);
	slot->command.prp1 = list.iova;
	slot->command.cdw12 = count - 1; /* where other commands have their blocks */
	return io->length;
}

uint64_t nvme_prepare(const struct nvme_disk *disk, struct nvme_slot *slot, const struct bdev_io *io)
{
	switch (io->op) {
	case BDEV_READ:
		return prepare_transfer(disk, slot, io, NVME_READ);
	case BDEV_WRITE:
		return prepare_transfer(disk, slot, io, NVME_WRITE);
	case BDEV_COMPARE:
		return prepare_transfer(disk, slot, io, NVME_COMPARE);
	case BDEV_UNMAP:
		return prepare_unmap(disk, slot, io);
	case BDEV_WRITE_ZEROES:
		return prepare_zeroes(disk, slot, io);
	case BDEV_VERIFY:
		return prepare_verify(disk, slot, io);
	case BDEV_COPY:
		return prepare_copy(disk, slot, io);
	default:
		return prepare_flush(disk, slot);
	}
}

void nvme_put_buffers(struct nvme_queue *queue, const struct nvme_slot *slot)
{
	if (unlikely(slot->bounce != NVME_NO_BOUNCE)) {
		queue->bounce_free[queue->bounce_count++] = slot->bounce;
	}
	if (unlikely(slot->more != NVME_NO_BOUNCE)) {
		queue->bounce_free[queue->bounce_count++] = slot->more;
	}
}
