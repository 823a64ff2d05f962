/*
 * The life of a task: scsi_task_start() finds its command in the table and lets it through, or not: unit
 * attentions, reservations, a unit that was stopped. While nothing of that has changed, which one comparison
 * tells, it takes no look at shared state. The executor ends the task, at once or when the bdev is done.
 */
#include "scsi/task.h"

#include <errno.h>
#include <stddef.h>

#include "scsi/commands.h"
#include "scsi/fence.h"
#include "scsi/sanitize.h"
#include "scsi/sense.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

_Static_assert(offsetof(struct scsi_task, io) == 0, "the task is found from its io");

/* --- task attributes, SAM-6 section 8.9 ------------------------------------------------------------- */

static void execute(struct scsi_task *task);

/* Start what waited, in its order, up to an ORDERED task that must wait for others still. */
static void release(struct scsi_unit *unit)
{
	struct scsi_task *task;

	if (unit->releasing) {
		return; /* a task that completed at once: the loop below goes on */
	}
	unit->releasing = true;
	while (!unit->ordered && (task = unit->waiting) != NULL) {
		bool ordered = task->attribute == SCSI_ORDERED;

		if (ordered && unit->running > 0) {
			break;
		}
		unit->waiting = task->link;
		if (unit->waiting == NULL) {
			unit->waiting_tail = &unit->waiting;
		}
		unit->ordered = ordered;
		unit->running++;
		execute(task);
	}
	unit->releasing = false;
}

/* True: the task waits. */
static bool must_wait(struct scsi_task *task)
{
	struct scsi_unit *unit = task->unit;

	if (task->attribute == SCSI_HEAD_OF_QUEUE || task->attribute == SCSI_ACA) {
		return false;
	}
	if (!unit->ordered && unit->waiting == NULL &&
	    (task->attribute != SCSI_ORDERED || unit->running == 0)) {
		unit->ordered = task->attribute == SCSI_ORDERED;
		return false;
	}
	task->link = NULL;
	*unit->waiting_tail = task;
	unit->waiting_tail = &task->link;
	return true;
}

/* --- the end ---------------------------------------------------------------------------------------- */

static void finish(struct scsi_task *task)
{
	struct scsi_unit *unit = task->started ? task->unit : NULL;

	if (likely(unit != NULL)) {
		if (unlikely(task->locked != NULL)) {
			bdev_unlock_range(task->locked, &task->lock);
			task->locked = NULL;
		}
		if (task->changes) {
			fence_end(unit);
		}
		unit->running--;
		unit->in_flight--;
		task->target->in_flight--;
		if (unlikely(task->attribute == SCSI_ORDERED)) {
			unit->ordered = false;
		}
		/* Keeps the unit while the transport hears of it. */
		if (unlikely(unit->waiting != NULL)) {
			task->done(task);
			release(unit);
			return;
		}
	}
	task->done(task);
}

void task_good(struct scsi_task *task)
{
	finish(task);
}

void task_status(struct scsi_task *task, enum scsi_status status)
{
	task->status = (uint8_t)status;
	finish(task);
}

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
	if (unlikely(control_byte(task->cdb) & NACA) && task->unit != NULL) {
		shared_set_aca(task->unit->shared, task->unit->nexus, true);
	}
	bool descriptors = task->unit != NULL && shared_state(task->unit->shared)->descriptor_sense;

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

/* --- parameter data --------------------------------------------------------------------------------- */

void task_reply(struct scsi_task *task, const void *data, uint64_t length, uint64_t allocation)
{
	uint64_t left = length < allocation ? length : allocation;

	task->overrun = left > task->in_bytes;
	for (uint32_t i = 0; i < task->in_count && left > 0; i++) {
		uint64_t part = task->in[i].iov_len < left ? task->in[i].iov_len : left;

		memcpy(task->in[i].iov_base, (const uint8_t *)data + task->transferred, part);
		task->transferred += part;
		left -= part;
	}
	task_good(task);
}

void task_copy_out(const struct scsi_task *task, uint64_t offset, void *to, uint64_t length)
{
	for (uint32_t i = 0; i < task->out_count && length > 0; i++) {
		const struct iovec *iov = &task->out[i];
		uint64_t part;

		if (offset >= iov->iov_len) {
			offset -= iov->iov_len;
			continue;
		}
		part = iov->iov_len - offset < length ? iov->iov_len - offset : length;
		memcpy(to, (const uint8_t *)iov->iov_base + offset, part);
		to = (uint8_t *)to + part;
		length -= part;
		offset = 0;
	}
}

/* The initiator may change its memory meanwhile: then it is told that all was the same up to the end. */
static uint64_t first_difference(const uint8_t *a, const uint8_t *b, uint64_t length)
{
	uint64_t i = 0;

	while (i + 1 < length && a[i] == b[i]) {
		i++;
	}
	return i;
}

uint64_t task_compare_out(const struct scsi_task *task, uint64_t offset, const void *data, uint64_t length)
{
	uint64_t done = 0;

	for (uint32_t i = 0; i < task->out_count && done < length; i++) {
		const struct iovec *iov = &task->out[i];
		const uint8_t *ours = (const uint8_t *)data + done;
		const uint8_t *theirs = (const uint8_t *)iov->iov_base + offset;
		uint64_t part;

		if (offset >= iov->iov_len) {
			offset -= iov->iov_len;
			continue;
		}
		part = iov->iov_len - offset < length - done ? iov->iov_len - offset : length - done;
		if (memcmp(ours, theirs, part) != 0) {
			return done + first_difference(ours, theirs, part);
		}
		done += part;
		offset = 0;
	}
	return done;
}

bool task_list(struct scsi_task *task, uint64_t length)
{
	if (length > SCSI_BUFFER_SIZE) {
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_PARAMETER_LIST_LENGTH);
		return false;
	}
	if (length > task->out_bytes) {
		task->overrun = true;
		task_good(task);
		return false;
	}
	task_copy_out(task, 0, task->buffer, length);
	task->transferred = length;
	task->buffer_used = length > 4096;
	return true;
}

/* --- work of the bdev ------------------------------------------------------------------------------- */

static void step_done(struct bdev_io *io, int status)
{
	struct scsi_task *task = (struct scsi_task *)io;

	if (unlikely(status < 0)) {
		task_error(task, status);
		return;
	}
	task->next(task);
}

static void other_step_done(struct bdev_io *io, int status)
{
	struct scsi_task *task = (struct scsi_task *)io;

	if (status < 0) {
		task->failed(task);
	} else {
		task->next(task);
	}
}

void task_submit(struct scsi_task *task, enum bdev_op op, uint64_t offset, uint64_t length,
		 void (*next)(struct scsi_task *task))
{
	struct bdev_io *io = &task->io;

	/* The unit may have lost its bdev since the last step. */
	if (unlikely(task->unit->bdev == NULL)) {
		task_error(task, -ENODEV);
		return;
	}
	task->next = next;
	io->bdev = task->unit->bdev;
	io->done = step_done;
	io->op = (uint8_t)op;
	io->offset = offset;
	io->length = length;
	bdev_submit(io);
}

void task_submit_buffer(struct scsi_task *task, enum bdev_op op, uint64_t offset, void *data, uint64_t length,
			void (*next)(struct scsi_task *task))
{
	task->buffer_used = true;
	task->piece = (struct iovec){.iov_base = data, .iov_len = length};
	task->io.iov = &task->piece;
	task->io.iovcnt = 1;
	task_submit(task, op, offset, length, next);
}

void task_submit_to(struct scsi_task *task, struct scsi_unit *unit, enum bdev_op op, uint64_t offset,
		    void *data, uint64_t length, void (*next)(struct scsi_task *task))
{
	struct bdev_io *io = &task->io;

	if (unit->bdev == NULL) {
		task->failed(task);
		return;
	}
	task->piece = (struct iovec){.iov_base = data, .iov_len = length};
	task->next = next;
	io->iov = &task->piece;
	io->iovcnt = 1;
	io->bdev = unit->bdev;
	io->done = other_step_done;
	io->op = (uint8_t)op;
	io->offset = offset;
	io->length = length;
	bdev_submit(io);
}

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

bool task_check_writable(struct scsi_task *task)
{
	if (likely(!task->unit->write_protect && !task->unit->bdev->readonly)) {
		return true;
	}
	task_sense(task, KEY_DATA_PROTECT, ASC_WRITE_PROTECTED);
	return false;
}

/* --- the beginning ---------------------------------------------------------------------------------- */

/* A command that is not let through as it is: true if it is an exception, or the task has ended. */
static bool pass_blocked(struct scsi_task *task)
{
	if (task->unit->aca && task->attribute != SCSI_ACA) {
		task_status(task, SCSI_ACA_ACTIVE);
		return false;
	}
	if (task->unit->sanitize != SCSI_SANITIZE_NONE && !sanitize_passes(task)) {
		return false;
	}
	if (task->command->access > task->unit->reserved) {
		task_status(task, SCSI_RESERVATION_CONFLICT);
		return false;
	}
	return true;
}

/* Shared state has changed: true, or the task has ended with a unit attention. */
static bool pass_news(struct scsi_task *task)
{
	struct scsi_unit *unit = task->unit;
	uint16_t code = 0;

	/* While there is an ACA, unit attentions wait for it to be cleared. */
	if (unit_refresh(unit) != 0 && !unit->aca && !(task->command->flags & COMMAND_ATTENTION_PASSES)) {
		code = unit_take_attention(unit);
	}
	if (code == 0) {
		return true;
	}
	task_sense(task, KEY_UNIT_ATTENTION, code);
	return false;
}

/* Unit attentions, reservations and readiness: true, or the task has ended. */
static inline __attribute__((always_inline)) bool let_through(struct scsi_task *task)
{
	const struct scsi_command *command = task->command;
	struct scsi_unit *unit = task->unit;
	uint32_t generation = atomic_load_explicit(&unit->shared->generation, memory_order_acquire);

	if (unlikely(generation != unit->generation) && !pass_news(task)) {
		return false;
	}
	if (unlikely(command->access > unit->allowed) && !pass_blocked(task)) {
		return false;
	}
	if (unlikely(unit->stopped) && command->flags & COMMAND_MEDIUM) {
		task_sense(task, KEY_NOT_READY, ASC_NOT_READY_INITIALIZING_COMMAND);
		return false;
	}
	return true;
}

static inline __attribute__((always_inline)) void execute_inline(struct scsi_task *task)
{
	if (unlikely(task->aborted)) {
		finish(task);
	} else if (unlikely(task->unit->bdev == NULL)) {
		task_error(task, -ENODEV);
	} else {
		if (task->command->access == ACCESS_CHANGE) {
			task->changes = true;
			fence_begin(task->unit);
		}
		if (likely(let_through(task))) {
			task->command->run(task);
		}
	}
}

static void execute(struct scsi_task *task)
{
	execute_inline(task);
}

/* There is no unit at this LUN, or only the well-known one. */
static void start_without_unit(struct scsi_task *task)
{
	unsigned needed = task->well_known ? COMMAND_WELL_KNOWN : COMMAND_WITHOUT_UNIT;

	task->unit = NULL;
	if (!(task->command->flags & needed)) {
		task_sense(task, KEY_ILLEGAL_REQUEST,
			   task->well_known ? ASC_INVALID_OPCODE : ASC_UNIT_NOT_SUPPORTED);
		return;
	}
	task->command->run(task);
}

/* Find the command and see that its CDB is well-formed: true, or the task has ended. */
static bool find_command(struct scsi_task *task)
{
	bool known;
	int bad;

	task->command = command_find(task->cdb, &known);
	if (unlikely(task->command == NULL)) {
		if (task->unit == NULL && !task->well_known) {
			task_sense(task, KEY_ILLEGAL_REQUEST, ASC_UNIT_NOT_SUPPORTED);
		} else if (known) {
			task_bad_cdb(task, 1, 4); /* the service action */
		} else {
			task_sense(task, KEY_ILLEGAL_REQUEST, ASC_INVALID_OPCODE);
		}
		return false;
	}
	bad = command_bad_bit(task->command, task->cdb);
	if (unlikely(bad >= 0)) {
		task_bad_cdb(task, (unsigned)bad / 8, bad % 8);
		return false;
	}
	return true;
}

void scsi_task_start(struct scsi_task *task)
{
	struct scsi_unit *unit = task->unit;

	task->status = SCSI_GOOD;
	task->sense_length = 0;
	task->overrun = false;
	task->transferred = 0;
	task->started = false;
	task->locked = NULL;
	task->changes = false;
	task->buffer_used = false;
	task->position = 0;
	task->io.flags = 0;
	if (unlikely(!find_command(task))) {
		return;
	}
	if (unlikely(unit == NULL || unit->bdev == NULL || unit->bdev->removed)) {
		start_without_unit(task);
		return;
	}
	if (unlikely(task->attribute == SCSI_ACA) && !shared_state(unit->shared)->nexus[unit->nexus].aca) {
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_INVALID_MESSAGE);
		return;
	}
	task->started = true;
	unit->in_flight++;
	task->target->in_flight++;
	if (unlikely(task->attribute != SCSI_SIMPLE || unit->ordered || unit->waiting != NULL) &&
	    must_wait(task)) {
		return;
	}
	unit->running++;
	execute_inline(task);
}
