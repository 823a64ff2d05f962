/* How a command ends that does not succeed: sense data, and what a bdev's errno means to an initiator. */
#include <errno.h>

#include "scsi/sense.h"
#include "scsi/task.h"

#define NACA 0x04

/* The CONTROL byte of a CDB, known or not: SAM-6 section 5.2, SPC-5 section 4.2.5.1. */
static uint8_t control_byte(const uint8_t *cdb)
{
	static const uint8_t sizes[8] = {6, 10, 10, 0, 16, 12, 0, 0};
	uint8_t size = sizes[cdb[0] >> 5];

	return size != 0 ? cdb[size - 1] : 0;
}

void task_fail(struct scsi_task *task, const struct sense *sense)
{
	bool descriptors = task->unit != NULL && shared_state(task->unit->shared)->descriptor_sense;

	if (control_byte(task->cdb) & NACA && task->unit != NULL) {
		shared_set_aca(task->unit->shared, task->unit->nexus, true);
	}
	task->sense_length = sense_write(sense, descriptors, task->sense);
	task_status(task, SCSI_CHECK_CONDITION);
}

void task_sense(struct scsi_task *task, enum scsi_key key, enum scsi_asc asc)
{
	task_fail(task, &(struct sense){.key = key, .asc = (uint16_t)asc});
}

void task_sense_information(struct scsi_task *task, enum scsi_key key, enum scsi_asc asc, uint64_t information)
{
	task_fail(task,
		  &(struct sense){
		      .key = key, .asc = (uint16_t)asc, .has_information = true, .information = information});
}

void task_sense_progress(struct scsi_task *task, enum scsi_asc asc, uint16_t progress)
{
	struct sense sense = {.key = KEY_NOT_READY, .asc = (uint16_t)asc, .has_specific = true};

	sense.specific[0] = 0x80; /* SKSV */
	put_be16(sense.specific + 1, progress);
	task_fail(task, &sense);
}

/* The field pointer of SPC-5 section 4.4.2.4.2. */
static void fail_field(struct scsi_task *task, enum scsi_asc asc, bool in_cdb, unsigned byte, int bit)
{
	struct sense sense = {.key = KEY_ILLEGAL_REQUEST, .asc = (uint16_t)asc, .has_specific = true};

	sense.specific[0] = (uint8_t)(0x80 | (in_cdb ? 0x40 : 0) | (bit >= 0 ? 0x08 | bit : 0));
	put_be16(sense.specific + 1, (uint16_t)byte);
	task_fail(task, &sense);
}

void task_bad_field(struct scsi_task *task, enum scsi_asc asc, unsigned byte)
{
	fail_field(task, asc, false, byte, -1);
}

void task_bad_cdb(struct scsi_task *task, unsigned byte, int bit)
{
	fail_field(task, ASC_INVALID_FIELD_IN_CDB, true, byte, bit);
}

void task_bad_list(struct scsi_task *task, unsigned byte, int bit)
{
	fail_field(task, ASC_INVALID_FIELD_IN_LIST, false, byte, bit);
}

void task_error(struct scsi_task *task, int error)
{
	bool reading = task->io.op == BDEV_READ || task->io.op == BDEV_VERIFY;

	switch (error) {
	case -ENODEV:
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_UNIT_NOT_SUPPORTED);
		break;
	case -ERANGE: /* it has become smaller since we looked */
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_LBA_OUT_OF_RANGE);
		break;
	case -EROFS:
		task_sense(task, KEY_DATA_PROTECT, ASC_WRITE_PROTECTED);
		break;
	case -ENOSPC:
	case -EDQUOT:
		task_sense(task, KEY_DATA_PROTECT, ASC_SPACE_ALLOCATION_FAILED);
		break;
	case -EAGAIN:
	case -ENOMEM:
		task_status(task, SCSI_BUSY);
		break;
	case -EBADE: /* by another host, in the drive itself */
		task_status(task, SCSI_RESERVATION_CONFLICT);
		break;
	case -EILSEQ:
		if (task->io.op == BDEV_COMPARE_AND_WRITE) {
			task_sense_information(task, KEY_MISCOMPARE, ASC_MISCOMPARE, task->io.miscompare);
			break;
		}
		/* fall through */
	case -EIO:
	case -ENODATA:
		task_sense(task, KEY_MEDIUM_ERROR, reading ? ASC_READ_ERROR : ASC_WRITE_ERROR);
		break;
	default:
		task_sense(task, KEY_HARDWARE_ERROR, ASC_INTERNAL_FAILURE);
	}
}
