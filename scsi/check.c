/* What executors check before they begin: the range of a command, its length, and leave to write. */
#include "scsi/limits.h"
#include "scsi/task.h"

#define likely(x) __builtin_expect(!!(x), 1)

bool task_check_range(struct scsi_task *task, uint64_t lba, uint64_t blocks)
{
	uint64_t size = unit_blocks(task->unit);

	/* An LBA at the end is out of range even of no blocks (SBC-4: past the capacity). */
	if (likely(lba < size && blocks <= size - lba)) {
		return true;
	}
	if (lba == size && blocks == 0) {
		return true;
	}
	task_sense(task, KEY_ILLEGAL_REQUEST, ASC_LBA_OUT_OF_RANGE);
	return false;
}

/* Where CDBs of 10, 12 and 16 bytes have TRANSFER LENGTH or VERIFICATION LENGTH. */
static unsigned length_byte(const struct scsi_task *task)
{
	switch (task->cdb[0] >> 5) { /* GROUP CODE: the size of the CDB (SPC-5 section 4.2.5.1) */
	case 4:
		return 10;
	case 5:
		return 6;
	default:
		return 7;
	}
}

bool task_check_transfer(struct scsi_task *task, uint64_t lba, uint32_t blocks)
{
	if (!task_check_range(task, lba, blocks)) {
		return false;
	}
	if (likely((uint64_t)blocks * unit_block_size(task->unit) <= SCSI_MAX_TRANSFER)) {
		return true;
	}
	task_bad_cdb(task, length_byte(task), 7);
	return false;
}

bool task_check_writable(struct scsi_task *task)
{
	if (likely(!task->unit->write_protect && !task->unit->bdev->readonly)) {
		return true;
	}
	task_sense(task, KEY_DATA_PROTECT, ASC_WRITE_PROTECTED);
	return false;
}
