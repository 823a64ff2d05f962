#include "bdev/piece.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>

#include "bdev/iov.h"

static bool is_aligned(const struct transfer_file *file, const struct bdev_io *io)
{
	const uintptr_t mask = file->memory_alignment - 1;
	uintptr_t bits = 0;

	for (uint32_t i = 0; i < io->iovcnt; i++) {
		bits |= (uintptr_t)io->iov[i].iov_base | io->iov[i].iov_len;
	}
	return !(bits & mask);
}

static uint32_t min_u32(uint64_t a, uint32_t b)
{
	return a < b ? (uint32_t)a : b;
}

static void prepare_direct(struct transfer *transfer)
{
	const struct bdev_io *io = transfer->io;
	bool write = io->op == BDEV_WRITE;

	transfer->piece = io->length;
	if (io->iovcnt == 1) {
		transfer->op.code = write ? FILE_WRITE : FILE_READ;
		transfer->op.address = io->iov->iov_base;
		transfer->op.length = io->length;
		return;
	}
	transfer->op.code = write ? FILE_WRITEV : FILE_READV;
	transfer->op.address = io->iov;
	transfer->op.length = io->iovcnt;
}

static void prepare_bounce(struct transfer *transfer)
{
	const struct bdev_io *io = transfer->io;

	transfer->piece = min_u32(io->length - transfer->done, PIECE_BOUNCE);
	transfer->op.code = io->op == BDEV_WRITE ? FILE_WRITE : FILE_READ;
	transfer->op.address = transfer->bounce;
	transfer->op.length = transfer->piece;
	if (io->op == BDEV_WRITE) {
		iov_copy(io, transfer->done, transfer->bounce, transfer->piece);
	}
}

bool piece_may_punch(const struct transfer_file *file, const struct bdev_io *io)
{
	return (io->flags & BDEV_IO_UNMAP) && file->punch_hole;
}

bool piece_can_zero(const struct transfer_file *file, const struct bdev_io *io)
{
	return file->zero_range || piece_may_punch(file, io);
}

static void prepare_whole(struct transfer *transfer)
{
	const struct bdev_io *io = transfer->io;
	bool punch = io->op == BDEV_UNMAP || piece_may_punch(transfer->file, io);

	if (io->op == BDEV_FLUSH) {
		transfer->op.code = FILE_FDATASYNC;
		return;
	}
	transfer->op.code = FILE_FALLOCATE;
	transfer->op.flags = FALLOC_FL_KEEP_SIZE | (punch ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
	transfer->op.length = io->length;
}

enum shape piece_shape(const struct transfer_file *file, const struct bdev_io *io)
{
	switch (io->op) {
	case BDEV_READ:
	case BDEV_WRITE:
		return is_aligned(file, io) ? DIRECT : BOUNCE;
	default:
		return WHOLE;
	}
}

void piece_prepare(struct transfer *transfer)
{
	const struct bdev_io *io = transfer->io;

	transfer->op.offset = io->offset + transfer->done;
	transfer->op.flags = io->op == BDEV_WRITE && (io->flags & BDEV_IO_FUA) ? RWF_DSYNC : 0;
	switch (transfer->shape) {
	case DIRECT:
		prepare_direct(transfer);
		break;
	case BOUNCE:
		prepare_bounce(transfer);
		break;
	case WHOLE:
		prepare_whole(transfer);
		break;
	}
}
