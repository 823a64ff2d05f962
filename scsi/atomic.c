/*
 * COMPARE AND WRITE (SBC-4 section 5.3) and ORWRITE (5.14).
 *
 * One at a time: whoever holds the shared lock reads, decides and writes; others wait in line in their own
 * reactor, and ask again after a moment while another reactor holds it. The lock survives its holder.
 *
 * All or nothing: once the comparison has succeeded, the data to be written and where stand in shared memory
 * (struct scsi_intent) before the first byte goes to the bdev. If the process dies there, the next holder of
 * the lock finds the intent and writes it again, whole, before anything of its own. When the command comes
 * again from the in-flight log, the intent tells that its comparison has been made.
 */
#include "scsi/atomic.h"

#include <stddef.h>

#include "scsi/commands.h"
#include "scsi/task.h"

#define FUA 0x08
#define RETRY_NS 20000

static enum scsi_intent_state intent_state(const struct scsi_intent *intent)
{
	return __atomic_load_n(&intent->state, __ATOMIC_ACQUIRE);
}

static void set_intent(struct scsi_intent *intent, enum scsi_intent_state state)
{
	__atomic_store_n(&intent->state, state, __ATOMIC_RELEASE);
}

/* --- taking turns ------------------------------------------------------------------------------------ */

static void start_next(struct scsi_unit *unit);
static void begin(struct scsi_task *task);

static void retry(struct timer *timer)
{
	start_next((struct scsi_unit *)((char *)timer - offsetof(struct scsi_unit, atomic_timer)));
}

void atomic_init_queue(struct scsi_unit *unit)
{
	unit->atomic_tail = &unit->atomic;
	unit->atomic_timer.fire = retry;
}

static void start_later(struct scsi_unit *unit, uint64_t wait_ns)
{
	uint64_t due = reactor_now(unit->reactor) + reactor_ns_to_ticks(wait_ns);

	if (timer_set(unit->reactor, &unit->atomic_timer, due) < 0 && wait_ns == 0) {
		start_next(unit);
	}
}

/* The head of the line takes the lock, if nobody else has it. */
static void start_next(struct scsi_unit *unit)
{
	struct scsi_task *task = unit->atomic;

	if (shared_begin_atomic(unit->shared) < 0) {
		start_later(unit, RETRY_NS);
		return;
	}
	unit->atomic = task->link;
	if (unit->atomic == NULL) {
		unit->atomic_tail = &unit->atomic;
	}
	unit->atomic_busy = true;
	task->atomic = true;
	begin(task);
}

static void wait_for_turn(struct scsi_task *task)
{
	struct scsi_unit *unit = task->unit;
	bool alone = unit->atomic == NULL && !unit->atomic_busy;

	task->link = NULL;
	*unit->atomic_tail = task;
	unit->atomic_tail = &task->link;
	if (alone) {
		start_next(unit);
	}
}

void atomic_end(struct scsi_task *task)
{
	struct scsi_unit *unit = task->unit;
	struct scsi_intent *intent = &unit->shared->intent;

	/* A write that failed: nobody can promise it any more, and its initiator is told. */
	if (intent_state(intent) == SCSI_INTENT_PENDING) {
		set_intent(intent, SCSI_INTENT_NONE);
	}
	task->atomic = false;
	unit->atomic_busy = false;
	shared_end_atomic(unit->shared);
	if (unit->atomic != NULL) {
		start_later(unit, 0);
	}
}

/* --- COMPARE AND WRITE ------------------------------------------------------------------------------- */

#define OPCODE_COMPARE_AND_WRITE 0x89

static uint64_t offset_of(const struct scsi_task *task)
{
	return task->lba * unit_block_size(task->unit);
}

static void write_intent(struct scsi_task *task, void (*next)(struct scsi_task *task))
{
	struct scsi_intent *intent = &task->unit->shared->intent;

	task->io.flags = BDEV_IO_FUA;
	task_submit_buffer(task, BDEV_WRITE, intent->offset, intent->data, intent->length, next);
}

static void intent_written(struct scsi_task *task)
{
	set_intent(&task->unit->shared->intent, SCSI_INTENT_DONE);
	task->transferred = 2 * task->length;
	task_good(task);
}

static void compare(struct scsi_task *task)
{
	struct scsi_intent *intent = &task->unit->shared->intent;
	uint64_t same = task_compare_out(task, 0, task->buffer, task->length);

	if (same < task->length) {
		task->transferred = 2 * task->length;
		task_sense_information(task, KEY_MISCOMPARE, ASC_MISCOMPARE, same);
		return;
	}
	intent->nexus = task->unit->nexus;
	intent->tag = task->tag;
	intent->offset = offset_of(task);
	intent->length = task->length;
	task_copy_out(task, task->length, intent->data, task->length);
	set_intent(intent, SCSI_INTENT_PENDING);
	write_intent(task, intent_written);
}

/* Has this very command, which comes again from the in-flight log, been carried out already? */
static bool was_done(const struct scsi_task *task)
{
	const struct scsi_intent *intent = &task->unit->shared->intent;

	return task->again && intent_state(intent) == SCSI_INTENT_DONE && intent->nexus == task->unit->nexus &&
	       intent->tag == task->tag && intent->offset == offset_of(task) && intent->length == task->length;
}

static void read_and_modify(struct scsi_task *task);

static void repaired(struct scsi_task *task)
{
	set_intent(&task->unit->shared->intent, SCSI_INTENT_DONE);
	read_and_modify(task);
}

static void begin(struct scsi_task *task)
{
	if (intent_state(&task->unit->shared->intent) == SCSI_INTENT_PENDING) {
		write_intent(task, repaired); /* of one that died */
		return;
	}
	read_and_modify(task);
}

/* Check what both commands have in common; false: the task has ended. */
static bool check(struct scsi_task *task, unsigned length_byte, uint64_t data_length)
{
	if (task->length > SCSI_ATOMIC_BYTES) {
		task_bad_cdb(task, length_byte, 7);
		return false;
	}
	if (!task_check_writable(task) || !task_check_range(task, task->lba, task->blocks)) {
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

void run_compare_and_write(struct scsi_task *task)
{
	task->lba = get_be64(task->cdb + 2);
	task->blocks = task->cdb[13];
	task->length = task->blocks * unit_block_size(task->unit);
	if (check(task, 13, 2 * task->length)) {
		wait_for_turn(task);
	}
}

/* --- ORWRITE: doing it twice does no harm, so that it needs no intent -------------------------------- */

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
	task_submit_buffer(task, BDEV_WRITE, offset_of(task), task->buffer, task->length, or_written);
}

void run_orwrite(struct scsi_task *task)
{
	task->lba = get_be64(task->cdb + 2);
	task->blocks = get_be32(task->cdb + 10);
	task->length = task->blocks * unit_block_size(task->unit);
	if (check(task, 10, task->length)) {
		wait_for_turn(task);
	}
}

static void read_and_modify(struct scsi_task *task)
{
	bool compares = task->cdb[0] == OPCODE_COMPARE_AND_WRITE;

	if (task->aborted) {
		task_good(task);
	} else if (compares && was_done(task)) {
		intent_written(task);
	} else {
		task->io.flags = 0;
		task_submit_buffer(task, BDEV_READ, offset_of(task), task->buffer, task->length,
				   compares ? compare : or_in);
	}
}
