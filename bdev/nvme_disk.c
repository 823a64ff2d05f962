/*
 * From requests to commands. A request becomes as many commands as the controller's largest transfer and the
 * shape of its memory demand, most often one; it has completed when all of them have. The memory of a
 * command is described in place where the device can reach it there; otherwise a part of the request goes by
 * way of a bounce buffer, and so does memory so scattered that it would take many small commands.
 */
#include "bdev/nvme_disk.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bdev/dma.h"
#include "bdev/iov.h"
#include "bdev/nvme_data.h"

#define DIRECT_MIN (32U << 10) /* a part in place that is shorter costs more than a copy of all */
#define PAGE_MASK (NVME_PAGE_SIZE - 1ULL)
#define BLOCKS_MAX 65536 /* a command's count of blocks has 16 bits, of its blocks less 1 */

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

struct nvme_disk {
	struct bdev bdev;
	struct nvme_queue *queue;
	uint32_t nsid;
	uint32_t block_shift;
	uint32_t max_transfer;
	uint64_t plain; /* bytes that submit_plain() may take */
	bool write_zeroes;
	bool cache;
};

/* How far a request has come: kept in its scratch. */
struct progress {
	uint64_t issued;  /* bytes for which commands were submitted */
	uint32_t pending; /* commands in flight, and one until the last has been submitted */
	int32_t error;	  /* the first one */
};

_Static_assert(NVME_BOUNCE_SIZE == NVME_MORE_PAGES * NVME_PAGE_SIZE, "a bounce buffer holds what lists do not");
_Static_assert(sizeof(struct progress) <= sizeof(((struct bdev_io *)0)->scratch), "must fit");

static struct progress *progress_of(struct bdev_io *io)
{
	return (struct progress *)io->scratch;
}

static uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* --- commands --------------------------------------------------------------------------------------- */

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

static uint32_t fua_of(const struct bdev_io *io)
{
	return io->op == BDEV_WRITE && (io->flags & BDEV_IO_FUA) ? NVME_RW_FUA : 0;
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
	if (io->op == BDEV_WRITE) {
		iov_copy(io, slot->offset, nvme_bounce(queue, slot->bounce), length);
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
static uint64_t prepare_transfer(const struct nvme_disk *disk, struct nvme_slot *slot, const struct bdev_io *io)
{
	struct nvme_queue *queue = disk->queue;
	uint32_t limit = (uint32_t)min_u64(io->length - slot->offset, disk->max_transfer);
	uint32_t length = 0;

	begin_command(disk, slot, io->op == BDEV_WRITE ? NVME_WRITE : NVME_READ);
	slot->command.cdw12 = fua_of(io);
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

/* One range a command: ranges of one request that are apart come as requests of their own. */
static uint64_t prepare_unmap(const struct nvme_disk *disk, struct nvme_slot *slot, const struct bdev_io *io)
{
	uint64_t blocks = min_u64((io->length - slot->offset) >> disk->block_shift, UINT32_MAX);
	struct nvme_list list = nvme_slot_list(disk->queue, slot);

	begin_command(disk, slot, NVME_DATASET_MANAGEMENT);
	*(struct nvme_range *)list.page = (struct nvme_range){
	    .blocks = (uint32_t)blocks,
	    .first = (io->offset + slot->offset) >> disk->block_shift,
	};
	slot->command.prp1 = list.iova;
	slot->command.cdw11 = NVME_DSM_DEALLOCATE;
	return blocks << disk->block_shift;
}

static uint64_t prepare_zeroes(const struct nvme_disk *disk, struct nvme_slot *slot, const struct bdev_io *io)
{
	const struct nvme_queue *queue = disk->queue;
	struct nvme_list list = nvme_slot_list(queue, slot);
	uint64_t length = min_u64(io->length - slot->offset, disk->max_transfer);

	length = min_u64(length, (uint64_t)BLOCKS_MAX << disk->block_shift);
	if (disk->write_zeroes) {
		begin_command(disk, slot, NVME_WRITE_ZEROES);
		slot->command.cdw12 = io->flags & BDEV_IO_UNMAP ? NVME_ZEROES_DEALLOCATE : 0;
	} else {
		length = min_u64(length, NVME_BOUNCE_SIZE);
		begin_command(disk, slot, NVME_WRITE);
		nvme_describe_one(&slot->command, queue->iova + queue->layout.zeroes, (uint32_t)length, &list);
	}
	set_range(disk, slot, io, length);
	return length;
}

static uint64_t prepare(const struct nvme_disk *disk, struct nvme_slot *slot, const struct bdev_io *io)
{
	switch (io->op) {
	case BDEV_READ:
	case BDEV_WRITE:
		return prepare_transfer(disk, slot, io);
	case BDEV_UNMAP:
		return prepare_unmap(disk, slot, io);
	case BDEV_WRITE_ZEROES:
		return prepare_zeroes(disk, slot, io);
	default:
		return prepare_flush(disk, slot);
	}
}

/* --- requests --------------------------------------------------------------------------------------- */

/* One command less is in flight, or no more will be submitted. */
static void release(struct bdev_io *io)
{
	struct progress *progress = progress_of(io);

	if (--progress->pending == 0) {
		bdev_complete(io, progress->error);
	}
}

/* Submit what is left of a request; false if it has to wait for a slot or a bounce buffer. */
bool nvme_request_go_on(struct bdev_io *io)
{
	struct nvme_disk *disk = (struct nvme_disk *)io->bdev;
	struct progress *progress = progress_of(io);
	const uint64_t whole = io->op == BDEV_FLUSH ? 1 : io->length; /* see prepare_flush() */

	if (unlikely(disk->queue->state == NVME_DEAD && !progress->error)) {
		progress->error = -ENODEV;
	}
	while (progress->issued < whole && !progress->error) {
		struct nvme_slot *slot = nvme_queue_slot(disk->queue);
		uint64_t length;

		if (!slot) {
			return false;
		}
		slot->offset = progress->issued;
		length = prepare(disk, slot, io);
		if (unlikely(!length)) {
			return false; /* no bounce buffer */
		}
		slot->io = io;
		progress->issued += length;
		progress->pending++;
		nvme_queue_submit(disk->queue, slot);
	}
	release(io);
	return true;
}

void nvme_command_done(struct nvme_queue *queue, struct nvme_slot *slot, int status)
{
	struct bdev_io *io = slot->io;

	if (unlikely(slot->bounce != NVME_NO_BOUNCE)) {
		if (io->op == BDEV_READ && status == 0) {
			iov_copy(io, slot->offset, nvme_bounce(queue, slot->bounce), slot->length);
		}
		queue->bounce_free[queue->bounce_count++] = slot->bounce;
	}
	if (unlikely(slot->more != NVME_NO_BOUNCE)) {
		queue->bounce_free[queue->bounce_count++] = slot->more;
	}
	if (unlikely(status && !progress_of(io)->error)) {
		progress_of(io)->error = status;
	}
	release(io);
}

/* --- plain requests: a read or a write of one piece of memory in two pages at most ------------------- */

static void write_plain(const struct nvme_disk *disk, struct nvme_command *command,
			const struct nvme_slot *slot, const struct bdev_io *io, uint64_t iova)
{
	uint64_t first = io->offset >> disk->block_shift;
	uint32_t blocks = (uint32_t)(io->length >> disk->block_shift);
	bool two = (iova & PAGE_MASK) + io->length > NVME_PAGE_SIZE;

	*command = (struct nvme_command){
	    .opcode = io->op == BDEV_WRITE ? NVME_WRITE : NVME_READ,
	    .cid = slot->cid,
	    .nsid = disk->nsid,
	    .prp1 = iova,
	    .prp2 = two ? (iova | PAGE_MASK) + 1 : 0,
	    .cdw10 = (uint32_t)first,
	    .cdw11 = (uint32_t)(first >> 32),
	    .cdw12 = (blocks - 1) | fua_of(io),
	};
}

void nvme_command_again(const struct nvme_slot *slot, struct nvme_command *command)
{
	write_plain((const struct nvme_disk *)slot->io->bdev, command, slot, slot->io, slot->iova);
}

/*
 * Submit such a request without the detours that others take. False, and nothing has happened, if it is none,
 * or its memory is not near that of the last one.
 */
static inline bool submit_plain(struct nvme_disk *disk, struct bdev_io *io)
{
	struct nvme_queue *queue = disk->queue;
	struct nvme_slot *slot = queue->free;
	uint64_t iova;

	if (io->op > BDEV_WRITE || io->iovcnt != 1 || io->length > disk->plain || !queue->straight || !slot) {
		return false;
	}
	if (!dma_translate_near(io->iov->iov_base, io->length, &iova) || (iova & 3) ||
	    (iova & PAGE_MASK) + io->length > 2 * NVME_PAGE_SIZE) {
		return false;
	}
	write_plain(disk, nvme_queue_entry(queue), slot, io, iova);
	slot->io = io;
	slot->iova = iova;
	slot->attempts = 0;
	slot->plain = true;
	nvme_queue_take(queue, slot);
	nvme_queue_push(queue, slot);
	return true;
}

__attribute__((noinline)) static void submit_any(struct nvme_disk *disk, struct bdev_io *io)
{
	if (io->op <= BDEV_WRITE && disk->queue->straight &&
	    dma_find((uintptr_t)io->iov->iov_base, io->length) && submit_plain(disk, io)) {
		return;
	}
	if (io->op == BDEV_RESET) {
		bdev_complete_when_quiet(io);
		return;
	}
	if (io->op == BDEV_FLUSH && !disk->cache) {
		bdev_complete(io, disk->queue->state == NVME_DEAD ? -ENODEV : 0);
		return;
	}
	*progress_of(io) = (struct progress){.pending = 1};
	if ((disk->queue->waiting && disk->queue->state != NVME_DEAD) || !nvme_request_go_on(io)) {
		nvme_queue_wait(disk->queue, io);
	}
}

static void nvme_submit(struct bdev *bdev, struct bdev_io *io)
{
	struct nvme_disk *disk = (struct nvme_disk *)bdev;

	if (unlikely(!submit_plain(disk, io))) {
		submit_any(disk, io);
	}
}

/* --- life ------------------------------------------------------------------------------------------- */

static void nvme_close(struct bdev *bdev)
{
	struct nvme_disk *disk = (struct nvme_disk *)bdev;

	nvme_queue_put(disk->queue);
	free(disk);
}

static const struct bdev_ops nvme_ops = {
    .submit = nvme_submit,
    .close = nvme_close,
};

struct bdev *nvme_disk_open(struct reactor *reactor, uint64_t id, uint32_t slot,
			    const struct nvme_disk_setup *setup, const struct nvme_queue_setup *queue)
{
	uint32_t supported = (1U << BDEV_OPS) - 1;
	uint32_t block = setup->block_size;
	struct nvme_disk *disk;

	if (block < 512 || (block & (block - 1)) || setup->max_transfer < block) {
		errno = EINVAL;
		return NULL;
	}
	disk = calloc(1, sizeof(*disk));
	if (!disk) {
		return NULL;
	}
	disk->queue = nvme_queue_get(reactor, queue);
	if (!disk->queue) {
		free(disk);
		return NULL;
	}
	disk->nsid = setup->nsid;
	disk->block_shift = (uint32_t)__builtin_ctz(block);
	disk->max_transfer = (uint32_t)min_u64(setup->max_transfer, (uint64_t)BLOCKS_MAX * block);
	disk->max_transfer &= ~(block - 1);
	disk->plain = queue->direct ? (uint32_t)min_u64(disk->max_transfer, 2 * NVME_PAGE_SIZE) : 0;
	disk->write_zeroes = setup->write_zeroes;
	disk->cache = setup->cache;
	if (!setup->unmap) {
		supported &= ~(1U << BDEV_UNMAP);
	}
	bdev_init(&disk->bdev, &nvme_ops, reactor, id, slot, block, setup->block_count, supported,
		  setup->readonly);
	return &disk->bdev;
}
