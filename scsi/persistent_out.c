/*
 * PERSISTENT RESERVE OUT: SPC-5 section 6.17. The state is changed on a copy, which becomes the state when all
 * of it is done; the command ends when what it has preempted is over, and what is to survive a restart on disk.
 */
#include "scsi/commands.h"
#include "scsi/keep.h"
#include "scsi/persistent.h"
#include "scsi/task.h"

#define SPEC_I_PT 0x08
#define ALL_TG_PT 0x04
#define APTPL 0x01

static void keep(struct scsi_task *task)
{
	keep_wait(task, (uint32_t)task->length);
}

static void wait_for_preempted(struct scsi_task *task)
{
	fence_wait(task, keep);
}

/* PREEMPT AND ABORT, section 5.14.11.5. */
static void abort_preempted(struct scsi_task *task, const struct fence_set *preempted)
{
	*fence_set_of(task) = *preempted;
	task->buffer_used = true;
	task->next = wait_for_preempted;
	if (task->target->abort_others != NULL) {
		task->target->abort_others(task);
	} else {
		task->next(task);
	}
}

static void answer(struct scsi_task *task, const struct pr_request *request, enum pr_outcome outcome)
{
	switch (outcome) {
	case PR_DONE:
		task->length = request->kept;
		if (task->command->service_action == PR_PREEMPT_AND_ABORT) {
			abort_preempted(task, &request->preempted);
		} else {
			keep(task);
		}
		return;
	case PR_CONFLICT:
		task_status(task, SCSI_RESERVATION_CONFLICT);
		return;
	case PR_BAD_RELEASE:
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_INVALID_RELEASE);
		return;
	case PR_BAD_TYPE:
		task_bad_cdb(task, 2, task->cdb[2] & 0xf0 ? 7 : 3);
		return;
	case PR_BAD_KEY:
		task_bad_list(task, 8, -1);
		return;
	case PR_BAD_PORT:
		task_bad_list(task, 18, -1);
		return;
	case PR_BAD_ID:
		task_bad_list(task, PR_LIST_SIZE, -1);
		return;
	}
}

/* Is the list what the service action wants? If not the task has ended. */
static bool check_list(struct scsi_task *task, struct pr_request *request)
{
	bool move = task->command->service_action == PR_REGISTER_AND_MOVE;
	unsigned flags_at = move ? 17 : 20;
	uint32_t length = get_be32(task->cdb + 5);
	const uint8_t *list = task->buffer;

	if (move ? length != PR_LIST_SIZE + TRANSPORT_ID_SIZE : length != PR_LIST_SIZE) {
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_PARAMETER_LIST_LENGTH);
		return false;
	}
	if (!task_list(task, length)) {
		return false;
	}
	if (move && get_be32(list + 20) != TRANSPORT_ID_SIZE) {
		task_bad_list(task, 20, -1);
	} else if (!move && list[20] & SPEC_I_PT) {
		task_bad_list(task, 20, 3);
	} else if (!move && list[20] & ALL_TG_PT) {
		task_bad_list(task, 20, 2);
	} else if (list[flags_at] & APTPL && !task->unit->keeps) {
		task_bad_list(task, flags_at, 0);
	} else {
		request->key = get_be64(list);
		request->action_key = get_be64(list + 8);
		request->aptpl = list[flags_at] & APTPL;
		return true;
	}
	return false;
}

/* --- a command that comes again from the in-flight log ------------------------------------------------ */

static bool was_done(const struct pr_request *request, const struct scsi_task *task)
{
	const struct scsi_pr_done *done = &request->state->nexus[request->nexus].done;

	return task->again && done->valid && done->tag == task->tag && done->key == request->key &&
	       done->action_key == request->action_key && done->action == task->command->service_action;
}

/* Whom it had preempted is not known any more: wait for all that are not registered. */
static void fence_strangers(struct pr_request *request)
{
	for (uint32_t i = 0; i < SCSI_MAX_NEXUSES; i++) {
		if (i != request->nexus && request->state->nexus[i].key == 0) {
			fence_set_add(&request->preempted, i);
		}
	}
}

static void remember(struct pr_request *request, const struct scsi_task *task)
{
	request->state->nexus[request->nexus].done = (struct scsi_pr_done){
	    .tag = task->tag,
	    .key = request->key,
	    .action_key = request->action_key,
	    .action = (uint8_t)task->command->service_action,
	    .valid = true,
	};
}

/* Section 5.14.11.5: of those whose commands are aborted. */
static void clear_aca(struct pr_request *request)
{
	for (uint32_t i = 0; i < SCSI_MAX_NEXUSES; i++) {
		if (request->preempted.words[i / 64] >> i % 64 & 1) {
			request->state->nexus[i].aca = false;
		}
	}
}

/* With the lock: change the state, or say why not. */
static enum pr_outcome change(struct pr_request *request, const struct scsi_task *task)
{
	struct scsi_shared *shared = request->shared;
	bool kept = shared_state(shared)->aptpl;
	enum pr_outcome outcome = PR_DONE;

	request->state = shared_edit(shared);
	if (was_done(request, task)) {
		fence_strangers(request);
	} else {
		outcome = pr_act(request, (unsigned)task->command->service_action);
		if (outcome == PR_DONE) {
			if (task->command->service_action == PR_PREEMPT_AND_ABORT) {
				clear_aca(request);
			}
			remember(request, task);
			shared_commit(shared);
		}
	}
	if (outcome == PR_DONE && (kept || request->state->aptpl)) {
		request->kept = keep_ask(shared);
	}
	return outcome;
}

void run_persistent_out(struct scsi_task *task)
{
	struct pr_request request = {
	    .shared = task->unit->shared,
	    .list = task->buffer,
	    .nexus = task->unit->nexus,
	    .type = task->cdb[2] & 0x0f,
	    .scope = task->cdb[2] >> 4,
	};
	enum pr_outcome outcome;

	if (!check_list(task, &request)) {
		return;
	}
	shared_lock(request.shared);
	outcome = change(&request, task);
	shared_unlock(request.shared);
	answer(task, &request, outcome);
}
