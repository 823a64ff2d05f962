/*
 * What a command may have is a limit of the device. A request within that becomes as many commands as the shape
 * of its memory demands, most often one; it has completed when all of them have.
 */
#include "bdev/nvme_disk.h"

#include <errno.h>
#include <stdlib.h>

#include "bdev/divide.h"
#include "bdev/dma.h"
#include "bdev/emulate.h"
#include "bdev/iov.h"
#include "bdev/nvme_command.h"

#define PAGE_MASK (NVME_PAGE_SIZE - 1ULL)

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* How far a request has come: kept in its scratch. */
struct progress {
	uint64_t issued;  /* bytes for which commands were submitted */
	uint32_t pending; /* commands in flight, and one until the last has been submitted */
	int32_t error;	  /* the first one */
};

_Static_assert(sizeof(struct progress) <= sizeof(((struct bdev_io *)0)->scratch), "must fit");

static struct progress *progress_of(struct bdev_io *io)
{
	return (struct progress *)io->scratch;
}

static uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* --- requests --------------------------------------------------------------------------------------- */

/* One command less is in flight, or no more will be submitted. */
static void release(struct bdev_io *io)
{
	struct progress *progress = progress_of(io);

	if (--progress->pending) {
		return;
	}
	if (unlikely(io->op == BDEV_COMPARE && progress->error == -EILSEQ)) {
		emulate(io); /* the controller does not say where they differ: looked at again, from here */
		return;
	}
	if (unlikely(io->op == BDEV_VERIFY && progress->error == -EINVAL)) {
		emulate(io); /* it verifies less at once than it says, or not this */
		return;
	}
	bdev_complete(io, progress->error);
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
		length = nvme_prepare(disk, slot, io);
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

	if (slot->bounce != NVME_NO_BOUNCE && io->op == BDEV_READ && status == 0) {
		iov_copy(io, slot->offset, nvme_bounce(queue, slot->bounce), slot->length);
	}
	nvme_put_buffers(queue, slot);
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
	    .cdw12 = (blocks - 1) | nvme_fua(io),
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
	if (io->op == BDEV_COPY && io->offset < io->source + io->length &&
	    io->source < io->offset + io->length) {
		emulate(io); /* ranges that overlap are not for the command */
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

static uint32_t native_ops(const struct nvme_disk_setup *setup)
{
	uint32_t ops =
	    1U << BDEV_READ | 1U << BDEV_WRITE | 1U << BDEV_FLUSH | 1U << BDEV_WRITE_ZEROES | 1U << BDEV_RESET;

	ops |= setup->unmap ? 1U << BDEV_UNMAP : 0;
	ops |= setup->compare ? 1U << BDEV_COMPARE : 0;
	ops |= setup->verify ? 1U << BDEV_VERIFY : 0;
	ops |= setup->copy_blocks ? 1U << BDEV_COPY : 0;
	return ops;
}

/* Bytes of one Copy command, 0 without. */
static uint64_t copy_limit(const struct nvme_disk *disk, const struct nvme_disk_setup *setup)
{
	uint64_t ranges = min_u64(setup->copy_ranges, NVME_PAGE_SIZE / sizeof(struct nvme_source));

	return min_u64(setup->copy_blocks, ranges * disk->copy_range_blocks) << disk->block_shift;
}

/* What one command may have. */
static int set_limits(struct nvme_disk *disk, const struct nvme_disk_setup *setup)
{
	uint64_t most = (uint64_t)NVME_BLOCKS_MAX << disk->block_shift;
	uint64_t transfer = min_u64(setup->max_transfer, most) & ~(setup->block_size - 1ULL);
	uint64_t zeroes = setup->write_zeroes ? transfer : min_u64(transfer, NVME_BOUNCE_SIZE);
	struct bdev_limits limits = {
	    .bytes =
		{
		    [BDEV_READ] = transfer,
		    [BDEV_WRITE] = transfer,
		    [BDEV_COMPARE] = transfer,
		    [BDEV_VERIFY] = transfer,
		    [BDEV_WRITE_ZEROES] = zeroes,
		    [BDEV_UNMAP] = (uint64_t)UINT32_MAX << disk->block_shift,
		    [BDEV_COPY] = copy_limit(disk, setup),
		},
	};

	disk->plain = disk->queue->direct ? min_u64(transfer, 2 * NVME_PAGE_SIZE) : 0;
	return bdev_set_limits(&disk->bdev, &limits);
}

struct bdev *nvme_disk_open(struct reactor *reactor, uint64_t id, uint32_t slot,
			    const struct nvme_disk_setup *setup, const struct nvme_queue_setup *queue)
{
	uint32_t block = setup->block_size;
	struct nvme_disk *disk;
	int error;

	if (block < 512 || (block & (block - 1)) || setup->max_transfer < block) {
		errno = EINVAL;
		return NULL;
	}
	if (setup->copy_blocks && (!setup->copy_range_blocks || !setup->copy_ranges)) {
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
	disk->write_zeroes = setup->write_zeroes;
	disk->cache = setup->cache;
	disk->copy_range_blocks = (uint32_t)min_u64(setup->copy_range_blocks, NVME_BLOCKS_MAX);
	bdev_init(&disk->bdev, &nvme_ops, reactor, id, slot, block, setup->block_count, native_ops(setup),
		  setup->readonly);
	error = set_limits(disk, setup);
	if (error) {
		nvme_queue_put(disk->queue);
		free(disk);
		errno = -error;
		return NULL;
	}
	return &disk->bdev;
}
