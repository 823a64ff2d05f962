/* VERIFY and WRITE AND VERIFY: SBC-4 sections 5.36 and 5.50, by verifying or reading what is on the medium. */
#include "scsi/commands.h"
#include "scsi/task.h"

#define BYTCHK_SHIFT 1
#define VERIFY_PART (8U << 20) /* bytes that are verified at once, and that an abort waits for */

enum bytchk {
	CHECK_READABLE = 0,
	CHECK_DATA = 1,
	CHECK_ONE_BLOCK = 3, /* against every block of the range */
};

static enum bytchk check_of(const struct scsi_task *task)
{
	return task->cdb[1] >> BYTCHK_SHIFT & 3;
}

/* Compare what was read with Data-Out: the offset of the first difference in the range, or UINT64_MAX. */
static uint64_t compare(const struct scsi_task *task, uint64_t length)
{
	bool one_block = check_of(task) == CHECK_ONE_BLOCK;
	uint64_t step = one_block ? unit_block_size(task->unit) : length;

	for (uint64_t at = 0; at < length; at += step) {
		uint64_t from = one_block ? 0 : task->position;
		uint64_t same = task_compare_out(task, from, task->buffer + at, step);

		if (same < step) {
			return task->position + at + same;
		}
	}
	return UINT64_MAX;
}

static void read_chunk(struct scsi_task *task);

static void chunk_read(struct scsi_task *task)
{
	uint64_t length = task->io.length;

	if (check_of(task) != CHECK_READABLE) {
		uint64_t differs = compare(task, length);

		if (differs != UINT64_MAX) {
			task_sense_information(task, KEY_MISCOMPARE, ASC_MISCOMPARE, differs);
			return;
		}
	}
	task->position += length;
	read_chunk(task);
}

static void read_chunk(struct scsi_task *task)
{
	uint64_t left = task->length - task->position;
	uint64_t offset = task->lba * unit_block_size(task->unit) + task->position;

	if (left == 0 || task->aborted) {
		task_good(task);
		return;
	}
	task->io.flags = 0;
	if (check_of(task) == CHECK_READABLE) {
		task->io.iovcnt = 0;
		task_submit(task, BDEV_VERIFY, offset, left < VERIFY_PART ? left : VERIFY_PART, chunk_read);
		return;
	}
	task_submit_buffer(task, BDEV_READ, offset, task->buffer,
			   left < SCSI_BUFFER_SIZE ? left : SCSI_BUFFER_SIZE, chunk_read);
}

static bool check_list(struct scsi_task *task, uint64_t wanted)
{
	if (task->out_bytes < wanted) {
		task->overrun = true;
		task_good(task);
		return false;
	}
	task->transferred = wanted;
	return true;
}

static void verify(struct scsi_task *task, uint64_t lba, uint32_t blocks)
{
	uint32_t block_size = unit_block_size(task->unit);
	enum bytchk check = check_of(task);

	task->lba = lba;
	task->length = (uint64_t)blocks * block_size;
	if (check == 2) {
		task_bad_cdb(task, 1, 2);
		return;
	}
	if (!task_check_transfer(task, lba, blocks)) {
		return;
	}
	if (check == CHECK_READABLE || blocks == 0) {
		read_chunk(task);
	} else if (check_list(task, check == CHECK_DATA ? task->length : block_size)) {
		read_chunk(task);
	}
}

void run_verify_10(struct scsi_task *task)
{
	verify(task, get_be32(task->cdb + 2), get_be16(task->cdb + 7));
}

void run_verify_12(struct scsi_task *task)
{
	verify(task, get_be32(task->cdb + 2), get_be32(task->cdb + 6));
}

void run_verify_16(struct scsi_task *task)
{
	verify(task, get_be64(task->cdb + 2), get_be32(task->cdb + 10));
}

/* --- WRITE AND VERIFY -------------------------------------------------------------------------------- */

/* Only as much of Data-Out as the range takes. */
static void write_then_verify(struct scsi_task *task, uint64_t lba, uint32_t blocks)
{
	uint32_t block_size = unit_block_size(task->unit);
	uint64_t left = (uint64_t)blocks * block_size;

	task->lba = lba;
	task->length = left;
	if (check_of(task) > CHECK_DATA) {
		task_bad_cdb(task, 1, 2);
		return;
	}
	if (!task_check_writable(task) || !task_check_transfer(task, lba, blocks) || !check_list(task, left)) {
		return;
	}
	task->io.iov = task->out;
	for (task->io.iovcnt = 0; left > 0; task->io.iovcnt++) {
		struct iovec *iov = &task->out[task->io.iovcnt];

		iov->iov_len = iov->iov_len < left ? iov->iov_len : left;
		left -= iov->iov_len;
	}
	task->io.flags = BDEV_IO_FUA; /* it is the medium that is verified */
	task_submit(task, BDEV_WRITE, lba * block_size, task->length, read_chunk);
}

void run_write_verify_10(struct scsi_task *task)
{
	write_then_verify(task, get_be32(task->cdb + 2), get_be16(task->cdb + 7));
}

void run_write_verify_12(struct scsi_task *task)
{
	write_then_verify(task, get_be32(task->cdb + 2), get_be32(task->cdb + 6));
}

void run_write_verify_16(struct scsi_task *task)
{
	write_then_verify(task, get_be64(task->cdb + 2), get_be32(task->cdb + 10));
}
