/*
 * COMPARE AND WRITE (SBC-4 section 5.3), WRITE ATOMIC (5.48) and ORWRITE (5.14): the bdev locks their range in
 * all reactors (bdev/ranges.h), and carries out the first of them by itself. All or nothing: what dies with a
 * process is written by another, and a command that comes again from the in-flight log is known by its nexus
 * and tag.
 */
#include <errno.h>
#include <stddef.h>

#include "scsi/commands.h"
#include "scsi/limits.h"
#include "scsi/task.h"

#define FUA 0x08
#define OPCODE_WRITE_ATOMIC 0x9c

static uint64_t offset_of(const struct scsi_task *task)
{
	return task->lba * unit_block_size(task->unit);
}

/* Check what both commands have in common; false: the task has ended. */
static bool check(struct scsi_task *task, unsigned length_byte, uint64_t data_length)
{
	if (!task_check_writable(task) || !task_check_range(task, task->lba, task->blocks)) {
		return false;
	}
	if (task->length > SCSI_ATOMIC_BYTES) {
		task_bad_cdb(task, length_byte, 7);
		return false;
	}
	if (data_length > task->out_bytes) {
		task->overrun = true;
		task_good(task);
		return false;
	}
	if (task->length == 0) {
		task_good(task);
		return false;
	}
	return true;
}

/* --- COMPARE AND WRITE ------------------------------------------------------------------------------- */

static void written(struct scsi_task *task)
{
	task->transferred = 2 * task->length;
	task_good(task);
}

void run_compare_and_write(struct scsi_task *task)
{
	task->lba = get_be64(task->cdb + 2);
	task->blocks = task->cdb[13];
	task->length = task->blocks * unit_block_size(task->unit);
	if (!check(task, 13, 2 * task->length)) {
		return;
	}
	task->transferred = 2 * task->length; /* of a comparison that fails, too */
	task->io.iov = task->out;
	task->io.iovcnt = task->out_count;
	task->io.flags = BDEV_IO_FUA | (task->again ? BDEV_IO_AGAIN : 0);
	task->io.token[0] = task->unit->nexus;
	task->io.token[1] = task->tag;
	task_submit(task, BDEV_COMPARE_AND_WRITE, offset_of(task), task->length, written);
}

/*
 * --- WRITE ATOMIC (16), section 5.48: no other command sees or makes a part of it. A process that dies in the
 * middle leaves the command in the in-flight log, to be carried out again, whole. What loses power has no
 * contents left: only devices in memory have the command. ---
 */

static void atomic_written(struct scsi_task *task)
{
	task->transferred = task->length;
	task_good(task);
}

static void write_atomic(struct scsi_task *task)
{
	uint64_t left = task->length;
	uint32_t used = 0;

	while (left > 0) { /* cut Data-Out to what is written */
		if (task->out[used].iov_len > left) {
			task->out[used].iov_len = left;
		}
		left -= task->out[used++].iov_len;
	}
	task->io.iov = task->out;
	task->io.iovcnt = used;
	task->io.flags = task->cdb[1] & FUA || !task->unit->write_cache ? BDEV_IO_FUA : 0;
	task->io.flags |= BDEV_IO_LOCKED;
	task_submit(task, BDEV_WRITE, offset_of(task), task->length, atomic_written);
}

/* --- ORWRITE: doing it twice does no harm, so that its lock is enough --------------------------------- */

static void or_written(struct scsi_task *task)
{
	task->transferred = task->length;
	task_good(task);
}

static void or_in(struct scsi_task *task)
{
	uint8_t *at = task->buffer;
	uint64_t left = task->length;

	for (uint32_t i = 0; left > 0; i++) {
		const uint8_t *data = task->out[i].iov_base;
		uint64_t part = task->out[i].iov_len < left ? task->out[i].iov_len : left;

		for (uint64_t j = 0; j < part; j++) {
			at[j] |= data[j];
		}
		at += part;
		left -= part;
	}
	task->io.flags = task->cdb[1] & FUA || !task->unit->write_cache ? BDEV_IO_FUA : 0;
	task->io.flags |= BDEV_IO_LOCKED;
	task_submit_buffer(task, BDEV_WRITE, offset_of(task), task->buffer, task->length, or_written);
}

static void read_and_or(struct scsi_task *task)
{
	task_submit_buffer(task, BDEV_READ, offset_of(task), task->buffer, task->length, or_in);
}

static void granted(struct bdev_lock *lock, int status)
{
	struct scsi_task *task = (struct scsi_task *)((char *)lock - offsetof(struct scsi_task, lock));

	if (status < 0) {
		task_error(task, status);
		return;
	}
	task->locked = task->unit->bdev;
	if (task->aborted || task->locked == NULL) {
		task_error(task, -ENODEV); /* nobody hears it */
		return;
	}
	if (task->cdb[0] == OPCODE_WRITE_ATOMIC) {
		write_atomic(task);
	} else {
		read_and_or(task);
	}
}

/* Have the task's range for itself, and go on in granted(). */
static void lock(struct scsi_task *task)
{
	int error;

	task->lock.granted = granted;
	task->lock.offset = offset_of(task);
	task->lock.length = task->length;
	error = bdev_lock_range(task->unit->bdev, &task->lock);
	if (error < 0) {
		task_error(task, error);
	}
}

void run_orwrite(struct scsi_task *task)
{
	task->lba = get_be64(task->cdb + 2);
	task->blocks = get_be32(task->cdb + 10);
	task->length = task->blocks * unit_block_size(task->unit);
	if (check(task, 10, task->length)) {
		lock(task);
	}
}

void run_write_atomic(struct scsi_task *task)
{
	task->lba = get_be64(task->cdb + 2);
	task->blocks = get_be16(task->cdb + 12);
	task->length = task->blocks * unit_block_size(task->unit);
	if (!unit_writes_atomically(task->unit)) {
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_INVALID_OPCODE);
	} else if (check(task, 12, task->length)) {
		lock(task);
	}
}
