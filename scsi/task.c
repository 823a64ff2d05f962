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

/* --- task attributes, SAM-6 "Task attributes" ------------------------------------------------------- */

static void execute(struct scsi_task *task);

static uint32_t running(const struct scsi_unit *unit)
{
	return unit->in_flight - unit->waiting_count;
}

/* Start what waited, in its order, up to an ORDERED task that must wait for others still. */
static __attribute__((noinline)) void release(struct scsi_unit *unit)
{
	struct scsi_task *task;

	if (unit->releasing) {
		return; /* a task that completed at once: the loop below goes on */
	}
	unit->releasing = true;
	while (!unit->ordered && (task = unit->waiting) != NULL) {
		bool ordered = task->attribute == SCSI_ORDERED;

		if (ordered && running(unit) > 0) {
			break;
		}
		unit->waiting = task->link;
		if (unit->waiting == NULL) {
			unit->waiting_tail = &unit->waiting;
		}
		unit->waiting_count--;
		unit->ordered = ordered;
		execute(task);
	}
	unit->releasing = false;
}

/* True: the task, which is counted as in flight, waits. */
static bool must_wait(struct scsi_task *task)
{
	struct scsi_unit *unit = task->unit;

	if (task->attribute == SCSI_HEAD_OF_QUEUE || task->attribute == SCSI_ACA) {
		return false;
	}
	if (!unit->ordered && unit->waiting == NULL &&
	    (task->attribute != SCSI_ORDERED || running(unit) == 1)) {
		unit->ordered = task->attribute == SCSI_ORDERED;
		return false;
	}
	task->link = NULL;
	*unit->waiting_tail = task;
	unit->waiting_tail = &task->link;
	unit->waiting_count++;
	return true;
}

/* --- the end ---------------------------------------------------------------------------------------- */

static void finish_peculiar(struct scsi_task *task);

/* The same of a task that holds a range. */
static __attribute__((noinline)) void finish_locked(struct scsi_task *task)
{
	struct bdev *bdev = task->locked;

	task->locked = NULL;
	bdev_unlock_range(bdev, &task->lock);
	finish_peculiar(task);
}

/* The same where tasks wait, or may. */
static __attribute__((noinline)) void finish_in_order(struct scsi_task *task)
{
	struct scsi_unit *unit = task->unit;

	unit->in_flight--;
	if (task->attribute == SCSI_ORDERED) {
		unit->ordered = false;
	}
	task->done(task); /* the unit stays: Python frees it, between turns of the poll loop */
	release(unit);
}

/* The same of a task that changes the medium, is not SIMPLE, or is waited for. */
static __attribute__((noinline)) void finish_peculiar(struct scsi_task *task)
{
	struct scsi_unit *unit = task->unit;

	if (unlikely(task->locked != NULL)) {
		finish_locked(task);
		return;
	}
	if (likely(task->changes)) {
		fence_end(unit);
	}
	if (unlikely(unit->waiting_count | (uint32_t)unit->ordered)) {
		finish_in_order(task);
		return;
	}
	unit->in_flight--;
	task->done(task);
}

static inline __attribute__((always_inline)) void finish(struct scsi_task *task)
{
	struct scsi_unit *unit = task->unit;

	if (likely(unit != NULL)) {
		if (task->peculiar | unit->waiting_count) {
			finish_peculiar(task);
			return;
		}
		unit->in_flight--;
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

static inline __attribute__((always_inline)) void submit(struct scsi_task *task, enum bdev_op op,
							 uint64_t offset, uint64_t length,
							 void (*done)(struct bdev_io *io, int status))
{
	struct bdev_io *io = &task->io;

	io->bdev = task->unit->bdev;
	io->done = done;
	io->op = (uint8_t)op;
	io->offset = offset;
	io->length = length;
	bdev_submit(io);
}

void task_submit_all(struct scsi_task *task, enum bdev_op op, uint64_t offset, uint64_t length,
		     void (*done)(struct bdev_io *io, int status))
{
	submit(task, op, offset, length, done);
}

void task_submit(struct scsi_task *task, enum bdev_op op, uint64_t offset, uint64_t length,
		 void (*next)(struct scsi_task *task))
{
	/* The unit may have lost its bdev since the last step. */
	if (unlikely(task->unit->bdev == NULL)) {
		task_error(task, -ENODEV);
		return;
	}
	task->next = next;
	submit(task, op, offset, length, step_done);
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
	if (task->unit->stopped && task->command->flags & COMMAND_MEDIUM) {
		task_sense(task, KEY_NOT_READY, ASC_NOT_READY_INITIALIZING_COMMAND);
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
	return true;
}

/* The same of any command. */
static __attribute__((noinline)) bool find_any_command(struct scsi_task *task)
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

/* Find the command and see that its CDB is well-formed: true, or the task has ended. */
static inline __attribute__((always_inline)) bool find_command(struct scsi_task *task)
{
	task->command = command_usual(task->cdb);
	return likely(task->command != NULL) || find_any_command(task);
}

static inline __attribute__((always_inline)) void execute_inline(struct scsi_task *task)
{
	if (unlikely(!find_command(task))) {
		return;
	}
	if (task->command->access == ACCESS_CHANGE) {
		task->changes = true;
		fence_begin(task->unit);
	}
	if (likely(let_through(task))) {
		task->command->run(task);
	}
}

/* The same of a task that has waited: much may have happened. */
static void execute(struct scsi_task *task)
{
	if (task->aborted) {
		finish(task);
	} else if (task->unit->bdev == NULL) {
		task_error(task, -ENODEV);
	} else {
		execute_inline(task);
	}
}

/* There is no unit at this LUN, or only the well-known one. */
static __attribute__((noinline)) void start_without_unit(struct scsi_task *task)
{
	unsigned needed = task->well_known ? COMMAND_WELL_KNOWN : COMMAND_WITHOUT_UNIT;

	task->unit = NULL;
	if (!find_command(task)) {
		return;
	}
	if (!(task->command->flags & needed)) {
		task_sense(task, KEY_ILLEGAL_REQUEST,
			   task->well_known ? ASC_INVALID_OPCODE : ASC_UNIT_NOT_SUPPORTED);
		return;
	}
	task->command->run(task);
}

/* The same where attributes matter. */
static __attribute__((noinline)) void start_in_order(struct scsi_task *task)
{
	const struct scsi_unit *unit = task->unit;

	if (task->attribute == SCSI_ACA && !shared_state(unit->shared)->nexus[unit->nexus].aca) {
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_INVALID_MESSAGE);
	} else if (!must_wait(task)) {
		execute_inline(task);
	}
}

void scsi_task_start(struct scsi_task *task)
{
	struct scsi_unit *unit = task->unit;

	task->position = 0;
	task->locked = NULL;
	task->io.flags = 0;
	if (unlikely(unit == NULL || unit->bdev == NULL || unit->bdev->removed)) {
		start_without_unit(task);
		return;
	}
	unit->in_flight++;
	if (unlikely((uint32_t)task->attribute | unit->ordered | unit->waiting_count)) {
		start_in_order(task);
		return;
	}
	execute_inline(task);
}
