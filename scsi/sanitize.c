/*
 * SANITIZE: the work is the control process's (scsi/sanitizer.py), which outlives the command, its initiator
 * and any reactor. Here the unit is closed to all commands but a few, what others have begun is waited for, and
 * then the control process is told.
 */
#include "scsi/sanitize.h"

#include "reactor/barrier.h"
#include "scsi/commands.h"
#include "scsi/fence.h"
#include "scsi/sense.h"
#include "scsi/task.h"
#include "scsi/wait.h"

#define OPCODE_SANITIZE 0x48
#define IMMED 0x80
#define AUSE 0x20
#define INVERT 0x80
#define HEADER 4

enum service_action {
	OVERWRITE = 0x01,
	BLOCK_ERASE = 0x02,
	EXIT_FAILURE_MODE = 0x1f,
};

/* --- while it goes on, and after a failure ------------------------------------------------------------- */

void sanitize_sense(const struct scsi_unit *unit, struct sense *sense)
{
	uint32_t progress = atomic_load(&unit->shared->sanitize_progress);

	if (unit->sanitize == SCSI_SANITIZE_FAILED) {
		sense->key = KEY_MEDIUM_ERROR;
		sense->asc = ASC_SANITIZE_FAILED;
		return;
	}
	sense->key = KEY_NOT_READY;
	sense->asc = ASC_NOT_READY_SANITIZE;
	sense->has_specific = true;
	sense->specific[0] = 0x80; /* SKSV */
	put_be16(sense->specific + 1, progress < UINT16_MAX ? (uint16_t)progress : UINT16_MAX);
}

bool sanitize_passes(struct scsi_task *task)
{
	struct sense sense = {0};

	if (task->command->flags & COMMAND_SANITIZING ||
	    (task->command->opcode == OPCODE_SANITIZE && task->unit->sanitize == SCSI_SANITIZE_FAILED)) {
		return true;
	}
	sanitize_sense(task->unit, &sense);
	task_fail(task, &sense);
	return false;
}

/* --- the command ----------------------------------------------------------------------------------------- */

static bool is_over(struct scsi_task *task)
{
	return shared_state(task->unit->shared)->sanitize != SCSI_SANITIZE_RUNNING;
}

static bool is_noted(struct scsi_task *task)
{
	return atomic_load(&task->unit->shared->sanitize_noted) || is_over(task);
}

static void answer(struct scsi_task *task)
{
	if (shared_state(task->unit->shared)->sanitize == SCSI_SANITIZE_FAILED) {
		task_sense(task, KEY_MEDIUM_ERROR, ASC_SANITIZE_FAILED);
	} else {
		task_good(task);
	}
}

static void set_state(struct scsi_shared *shared, enum scsi_sanitize_state state)
{
	shared_edit(shared)->sanitize = (uint8_t)state;
	shared_commit(shared);
}

static void start(struct scsi_task *task, const struct scsi_sanitize *sanitize)
{
	struct scsi_shared *shared = task->unit->shared;
	bool busy;

	shared_lock(shared);
	busy = shared_state(shared)->sanitize == SCSI_SANITIZE_RUNNING;
	if (!busy) {
		shared->sanitize = *sanitize;
		atomic_store(&shared->sanitize_progress, 0);
		atomic_store(&shared->sanitize_noted, false);
		set_state(shared, SCSI_SANITIZE_RUNNING);
	}
	shared_unlock(shared);
	if (busy && !task->again) {
		task_status(task, SCSI_BUSY); /* two at once: the other one has won */
		return;
	}
	/* What it changes is done by others, who wait until nothing else is in flight. */
	fence_end(task->unit);
	task->changes = false;
	unit_tell_news(task->unit);
	if (task->cdb[1] & IMMED) {
		wait_until(task, is_noted, task_good);
	} else {
		wait_until(task, is_over, answer);
	}
}

static bool read_overwrite(struct scsi_task *task, struct scsi_sanitize *sanitize)
{
	uint32_t length = get_be16(task->cdb + 7);
	uint32_t most = unit_block_size(task->unit);

	most = most < SCSI_SANITIZE_PATTERN ? most : SCSI_SANITIZE_PATTERN;
	if (length <= HEADER || length > HEADER + most) {
		task_bad_cdb(task, 7, -1);
		return false;
	}
	if (!task_list(task, length)) {
		return false;
	}
	sanitize->passes = task->buffer[0] & 0x1f;
	sanitize->invert = task->buffer[0] & INVERT;
	sanitize->length = get_be16(task->buffer + 2);
	if (task->buffer[0] & 0x60) { /* TEST: vendor specific */
		task_bad_list(task, 0, 6);
	} else if (sanitize->passes == 0) {
		task_bad_list(task, 0, 4);
	} else if (task->buffer[1] != 0) {
		task_bad_list(task, 1, -1);
	} else if (sanitize->length != length - HEADER) {
		task_bad_list(task, 2, -1);
	} else {
		memcpy(sanitize->pattern, task->buffer + HEADER, sanitize->length);
		return true;
	}
	return false;
}

/* A failure that was allowed to be left (AUSE) is left; where there is none nothing happens. */
static void exit_failure(struct scsi_task *task)
{
	struct scsi_shared *shared = task->unit->shared;
	bool stays;

	shared_lock(shared);
	stays = shared_state(shared)->sanitize == SCSI_SANITIZE_FAILED && !shared->sanitize.unrestricted;
	if (shared_state(shared)->sanitize == SCSI_SANITIZE_FAILED && !stays) {
		set_state(shared, SCSI_SANITIZE_NONE);
	}
	shared_unlock(shared);
	if (stays) {
		task_bad_cdb(task, 1, 4);
	} else {
		unit_tell_news(task->unit); /* the file that has the failure goes */
		task_good(task);
	}
}

void run_sanitize(struct scsi_task *task)
{
	struct scsi_sanitize sanitize = {.passes = 1, .unrestricted = task->cdb[1] & AUSE};
	uint8_t action = (uint8_t)task->command->service_action;

	if (task->unit->news < 0) {
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_INVALID_OPCODE);
		return;
	}
	if (action != OVERWRITE && get_be16(task->cdb + 7) != 0) {
		task_bad_cdb(task, 7, -1);
		return;
	}
	if (action == EXIT_FAILURE_MODE) {
		exit_failure(task);
		return;
	}
	sanitize.erase = action == BLOCK_ERASE;
	if (task_check_writable(task) && (sanitize.erase || read_overwrite(task, &sanitize))) {
		start(task, &sanitize);
	}
}

/* --- for the control process --------------------------------------------------------------------------- */

bool scsi_shared_is_idle(struct scsi_shared *shared)
{
	uint32_t seats = atomic_load(&shared->seats_used);

	barrier_everywhere();
	for (uint32_t seat = 0; seat < seats; seat++) {
		for (uint32_t i = 0; i < SCSI_MAX_NEXUSES; i++) {
			if (atomic_load_explicit(&shared->seats[seat].changing[i], memory_order_acquire) != 0) {
				return false;
			}
		}
	}
	return true;
}

enum scsi_sanitize_state scsi_shared_sanitize(struct scsi_shared *shared, struct scsi_sanitize *out)
{
	enum scsi_sanitize_state state;

	shared_lock(shared);
	state = shared_state(shared)->sanitize;
	*out = shared->sanitize;
	shared_unlock(shared);
	return state;
}

void scsi_shared_sanitize_noted(struct scsi_shared *shared)
{
	atomic_store(&shared->sanitize_noted, true);
}

void scsi_shared_sanitize_restore(struct scsi_shared *shared, const struct scsi_sanitize *what, bool failed)
{
	shared_lock(shared);
	shared->sanitize = *what;
	set_state(shared, failed ? SCSI_SANITIZE_FAILED : SCSI_SANITIZE_RUNNING);
	shared_unlock(shared);
}

void scsi_shared_sanitize_progress(struct scsi_shared *shared, uint32_t progress)
{
	atomic_store(&shared->sanitize_progress, progress);
}

void scsi_shared_sanitized(struct scsi_shared *shared, bool failed)
{
	shared_lock(shared);
	set_state(shared, failed ? SCSI_SANITIZE_FAILED : SCSI_SANITIZE_NONE);
	shared_unlock(shared);
}
