/* What the medium is and what state it is in: SBC-4 chapter 5, SPC-5 for PREVENT ALLOW MEDIUM REMOVAL. */
#include "bdev/extent.h"
#include "scsi/commands.h"
#include "scsi/limits.h"
#include "scsi/task.h"

/* --- READ CAPACITY ---------------------------------------------------------------------------------- */

void run_read_capacity_10(struct scsi_task *task)
{
	uint64_t last = unit_blocks(task->unit) - 1;
	uint8_t data[8];

	/* Without PMI the LBA has no meaning, and PMI is obsolete (SBC-4 section 5.20). */
	if (task->cdb[8] & 1 ? false : get_be32(task->cdb + 2) != 0) {
		task_bad_cdb(task, 2, 7);
		return;
	}
	put_be32(data, last <= UINT32_MAX ? (uint32_t)last : UINT32_MAX);
	put_be32(data + 4, unit_block_size(task->unit));
	task_reply(task, data, sizeof(data), sizeof(data));
}

void run_read_capacity_16(struct scsi_task *task)
{
	uint8_t data[32] = {0};

	if (!(task->cdb[14] & 1) && get_be64(task->cdb + 2) != 0) {
		task_bad_cdb(task, 2, 7);
		return;
	}
	put_be64(data, unit_blocks(task->unit) - 1);
	put_be32(data + 8, unit_block_size(task->unit));
	if (unit_can_unmap(task->unit)) {
		data[14] = task->unit->bdev->sparse ? 0xc0 : 0x80; /* LBPME, LBPRZ */
	}
	task_reply(task, data, sizeof(data), get_be32(task->cdb + 10));
}

/* --- GET LBA STATUS, SBC-4 section 5.7 ---------------------------------------------------------------- */

#define STATUS_HEADER 8
#define STATUS_SIZE 16
#define STATUS_MAX 16	/* extents that the bdev is asked for, each of which may take it a system call or two */
#define DEALLOCATED 0x1 /* PROVISIONING STATUS; 0: mapped, or not known */

/* The extent at @lba: its length in blocks, or -errno. */
static int64_t find_extent(const struct scsi_unit *unit, uint64_t lba, uint8_t *status)
{
	uint32_t block_size = unit_block_size(unit);
	uint64_t length;
	int kind = bdev_extent(unit->bdev, lba * block_size, &length);

	*status = kind == BDEV_HOLE && unit_can_unmap(unit) ? DEALLOCATED : 0;
	return kind < 0 ? kind : (int64_t)(length / block_size);
}

/* Add @blocks to the last descriptor if that is of the same kind and can count them. */
static bool extend(uint8_t *descriptor, uint64_t blocks, uint8_t status)
{
	uint64_t total = get_be32(descriptor + 8) + blocks;

	if (descriptor[12] != status || total > UINT32_MAX) {
		return false;
	}
	put_be32(descriptor + 8, (uint32_t)total);
	return true;
}

/* Write descriptors for the extents from @lba on, at most up to @end of @data; where they end, or -errno. */
static int put_extents(const struct scsi_unit *unit, uint64_t lba, uint8_t *data, unsigned end)
{
	uint64_t size = unit_blocks(unit);
	unsigned at = STATUS_HEADER;

	for (unsigned i = 0; i < STATUS_MAX && lba < size; i++) {
		uint8_t status;
		int64_t found = find_extent(unit, lba, &status);
		uint32_t blocks = found <= UINT32_MAX ? (uint32_t)found : UINT32_MAX;

		if (found < 0) {
			return (int)found;
		}
		if (at == STATUS_HEADER || !extend(data + at - STATUS_SIZE, blocks, status)) {
			if (at + STATUS_SIZE > end) {
				break;
			}
			put_be64(data + at, lba);
			put_be32(data + at + 8, blocks);
			data[at + 12] = status;
			at += STATUS_SIZE;
		}
		lba += blocks;
	}
	return (int)at;
}

void run_get_lba_status(struct scsi_task *task)
{
	uint64_t lba = get_be64(task->cdb + 2);
	uint32_t allocation = get_be32(task->cdb + 10);
	uint8_t data[STATUS_HEADER + STATUS_MAX * STATUS_SIZE] = {0};
	unsigned end = allocation < sizeof(data) ? allocation : sizeof(data);
	int length;

	if (lba >= unit_blocks(task->unit)) {
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_LBA_OUT_OF_RANGE);
		return;
	}
	/* One descriptor at least, though the reply may be cut, and as many more as there is room for. */
	length = put_extents(task->unit, lba, data,
			     end > STATUS_HEADER + STATUS_SIZE ? end : STATUS_HEADER + STATUS_SIZE);
	if (length < 0) {
		task_error(task, length);
		return;
	}
	put_be32(data, (uint32_t)length - 4);
	task_reply(task, data, (uint64_t)length, allocation);
}

/* --- PRE-FETCH: nothing says what fits into a cache below, so GOOD and not CONDITION MET -------------- */

void run_prefetch_10(struct scsi_task *task)
{
	if (task_check_range(task, get_be32(task->cdb + 2), get_be16(task->cdb + 7))) {
		task_good(task);
	}
}

void run_prefetch_16(struct scsi_task *task)
{
	if (task_check_range(task, get_be64(task->cdb + 2), get_be32(task->cdb + 10))) {
		task_good(task);
	}
}

/* --- START STOP UNIT, SBC-4 section 5.30 ------------------------------------------------------------ */

#define START 0x01
#define LOEJ 0x02
#define NO_FLUSH 0x04

static void set_stopped(struct scsi_task *task)
{
	struct scsi_shared *shared = task->unit->shared;
	bool stop = !(task->cdb[4] & START);

	shared_lock(shared);
	if (shared_state(shared)->stopped != stop) {
		shared_edit(shared)->stopped = stop;
		shared_commit(shared);
	}
	shared_unlock(shared);
	task_good(task);
}

void run_start_stop(struct scsi_task *task)
{
	if (task->cdb[3] != 0) {
		task_bad_cdb(task, 3, 3);
	} else if (task->cdb[4] & 0xf0) {
		task_bad_cdb(task, 4, 7); /* power conditions */
	} else if (task->cdb[4] & LOEJ) {
		task_bad_cdb(task, 4, 1); /* the medium does not come out */
	} else if (task->cdb[4] & (START | NO_FLUSH)) {
		set_stopped(task);
	} else {
		task_submit(task, BDEV_FLUSH, 0, 0, set_stopped);
	}
}

void run_prevent_allow(struct scsi_task *task)
{
	struct scsi_unit *unit = task->unit;
	bool prevent = task->cdb[4] & 1;

	if (task->cdb[4] & 2) {
		task_bad_cdb(task, 4, 1);
		return;
	}
	/* SPC-5: to prevent needs what a change of the medium needs. */
	if (prevent && unit->allowed < ACCESS_CHANGE) {
		task_status(task, SCSI_RESERVATION_CONFLICT);
		return;
	}
	shared_lock(unit->shared);
	if (shared_state(unit->shared)->nexus[unit->nexus].prevents_removal != prevent) {
		shared_edit(unit->shared)->nexus[unit->nexus].prevents_removal = prevent;
		shared_commit(unit->shared);
	}
	shared_unlock(unit->shared);
	task_good(task);
}

/* --- READ DEFECT DATA: there are none, in whatever format ------------------------------------------- */

void run_read_defects_10(struct scsi_task *task)
{
	uint8_t data[4] = {[1] = task->cdb[2] & 0x1f};

	task_reply(task, data, sizeof(data), get_be16(task->cdb + 7));
}

void run_read_defects_12(struct scsi_task *task)
{
	uint8_t data[8] = {[1] = task->cdb[1] & 0x1f};

	task_reply(task, data, sizeof(data), get_be32(task->cdb + 6));
}
