/*
 * READ, WRITE and SYNCHRONIZE CACHE: SBC-4 sections 5.17 to 5.20, 5.37 to 5.40, 5.31. The fast path: data
 * moves between the bdev and the initiator's own memory, and the task is all the state there is.
 */
#include <errno.h>

#include "scsi/commands.h"
#include "scsi/task.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

#define FUA 0x08

/* Cut a list of buffers down to its first @length bytes. */
static void cut(struct iovec *iov, uint32_t *count, uint64_t length)
{
	uint32_t used = 0;

	while (length > 0) {
		if (iov[used].iov_len > length) {
			iov[used].iov_len = length;
		}
		length -= iov[used++].iov_len;
	}
	*count = used;
}

/* --- READ ------------------------------------------------------------------------------------------- */

/* The end of a READ or a WRITE. */
static void moved(struct bdev_io *io, int status)
{
	struct scsi_task *task = (struct scsi_task *)io;

	if (unlikely(status < 0)) {
		task_error(task, status);
		return;
	}
	task->transferred = io->length;
	task_good(task);
}

static void read_medium(struct scsi_task *task, uint64_t offset, uint64_t length)
{
	task->io.iov = task->in;
	task->io.iovcnt = task->in_count;
	task_submit_all(task, BDEV_READ, offset, length, moved);
}

/* What is newer in the cache has gone to the medium; the unit may have lost its bdev meanwhile. */
static void read_flushed(struct scsi_task *task)
{
	if (task->unit->bdev == NULL) {
		task_error(task, -ENODEV);
	} else {
		read_medium(task, task->lba, task->length);
	}
}

/* FUA: the cache goes to the medium first (SBC-4 section 4.15). */
static __attribute__((noinline)) void flush_and_read(struct scsi_task *task, uint64_t offset, uint64_t length)
{
	task->lba = offset; /* in bytes from here on */
	task->length = length;
	task_submit(task, BDEV_FLUSH, 0, 0, read_flushed);
}

/* There are not as many bytes of buffers as the CDB asks for: true if there are more. */
static bool fits(struct scsi_task *task, struct iovec *iov, uint32_t *count, uint64_t bytes, uint64_t length)
{
	if (length > bytes) {
		task->overrun = true;
		task_good(task);
		return false;
	}
	cut(iov, count, length);
	return true;
}

static __attribute__((noinline)) void cut_and_read(struct scsi_task *task, uint64_t offset, uint64_t length,
						   bool fua)
{
	if (!fits(task, task->in, &task->in_count, task->in_bytes, length)) {
		return;
	}
	if (fua) {
		flush_and_read(task, offset, length);
	} else {
		read_medium(task, offset, length);
	}
}

static void start_read(struct scsi_task *task, uint64_t lba, uint32_t blocks, bool fua)
{
	uint32_t block_size = unit_block_size(task->unit);
	uint64_t length = (uint64_t)blocks * block_size;

	if (unlikely(!task_check_transfer(task, lba, blocks))) {
		return;
	}
	if (unlikely(length != task->in_bytes)) {
		cut_and_read(task, lba * block_size, length, fua);
	} else if (unlikely(fua)) {
		flush_and_read(task, lba * block_size, length);
	} else {
		read_medium(task, lba * block_size, length);
	}
}

void run_read_6(struct scsi_task *task)
{
	uint32_t blocks = task->cdb[4];

	start_read(task, get_be24(task->cdb + 1) & 0x1fffff, blocks != 0 ? blocks : 256, false);
}

void run_read_10(struct scsi_task *task)
{
	start_read(task, get_be32(task->cdb + 2), get_be16(task->cdb + 7), task->cdb[1] & FUA);
}

void run_read_12(struct scsi_task *task)
{
	start_read(task, get_be32(task->cdb + 2), get_be32(task->cdb + 6), task->cdb[1] & FUA);
}

void run_read_16(struct scsi_task *task)
{
	start_read(task, get_be64(task->cdb + 2), get_be32(task->cdb + 10), task->cdb[1] & FUA);
}

/* --- WRITE ------------------------------------------------------------------------------------------ */

static void write_medium(struct scsi_task *task, uint64_t offset, uint64_t length, bool fua)
{
	task->io.iov = task->out;
	task->io.iovcnt = task->out_count;
	task->io.flags = unlikely(fua) || unlikely(!task->unit->write_cache) ? BDEV_IO_FUA : 0;
	task_submit_all(task, BDEV_WRITE, offset, length, moved);
}

static __attribute__((noinline)) void cut_and_write(struct scsi_task *task, uint64_t offset, uint64_t length,
						    bool fua)
{
	if (fits(task, task->out, &task->out_count, task->out_bytes, length)) {
		write_medium(task, offset, length, fua);
	}
}

static void start_write(struct scsi_task *task, uint64_t lba, uint32_t blocks, bool fua)
{
	uint32_t block_size = unit_block_size(task->unit);
	uint64_t length = (uint64_t)blocks * block_size;

	if (unlikely(!task_check_writable(task)) || unlikely(!task_check_transfer(task, lba, blocks))) {
		return;
	}
	if (unlikely(length != task->out_bytes)) {
		cut_and_write(task, lba * block_size, length, fua);
	} else {
		write_medium(task, lba * block_size, length, fua);
	}
}

void run_write_6(struct scsi_task *task)
{
	uint32_t blocks = task->cdb[4];

	start_write(task, get_be24(task->cdb + 1) & 0x1fffff, blocks != 0 ? blocks : 256, false);
}

void run_write_10(struct scsi_task *task)
{
	start_write(task, get_be32(task->cdb + 2), get_be16(task->cdb + 7), task->cdb[1] & FUA);
}

void run_write_12(struct scsi_task *task)
{
	start_write(task, get_be32(task->cdb + 2), get_be32(task->cdb + 6), task->cdb[1] & FUA);
}

void run_write_16(struct scsi_task *task)
{
	start_write(task, get_be64(task->cdb + 2), get_be32(task->cdb + 10), task->cdb[1] & FUA);
}

/* --- SYNCHRONIZE CACHE: the whole cache, whatever the range; IMMED is allowed to wait as well ---------- */

static void start_flush(struct scsi_task *task, uint64_t lba, uint32_t blocks)
{
	if (task_check_range(task, lba, blocks)) {
		task_submit(task, BDEV_FLUSH, 0, 0, task_good);
	}
}

void run_synchronize_10(struct scsi_task *task)
{
	start_flush(task, get_be32(task->cdb + 2), get_be16(task->cdb + 7));
}

void run_synchronize_16(struct scsi_task *task)
{
	start_flush(task, get_be64(task->cdb + 2), get_be32(task->cdb + 10));
}
