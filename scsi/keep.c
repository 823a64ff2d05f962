/*
 * Persistent reservations that survive a restart: APTPL, SPC-5 section 5.14.3. The control process keeps a file
 * for each unit. Whoever changes what is to be kept counts the change, signals the control process, and
 * answers when the file has it.
 */
#include "scsi/keep.h"

#include <errno.h>

#include "scsi/persistent.h"
#include "scsi/task.h"
#include "scsi/wait.h"

/* --- in reactors ------------------------------------------------------------------------------------ */

uint32_t keep_ask(struct scsi_shared *shared)
{
	/* Zero is for what needs not be kept. */
	if (atomic_fetch_add(&shared->keep_asked, 1) == UINT32_MAX) {
		atomic_fetch_add(&shared->keep_asked, 1);
	}
	return atomic_load(&shared->keep_asked);
}

static bool is_kept(struct scsi_task *task)
{
	uint32_t done = atomic_load_explicit(&task->unit->shared->keep_done, memory_order_acquire);

	return (int32_t)(done - (uint32_t)task->position) >= 0;
}

static void answer(struct scsi_task *task)
{
	uint32_t failed = atomic_load(&task->unit->shared->keep_failed);

	if (failed != 0 && (int32_t)(failed - (uint32_t)task->position) >= 0) {
		task_sense(task, KEY_HARDWARE_ERROR, ASC_INTERNAL_FAILURE);
	} else {
		task_good(task);
	}
}

void keep_wait(struct scsi_task *task, uint32_t number)
{
	if (number == 0) {
		task_good(task);
		return;
	}
	task->position = number;
	unit_tell_news(task->unit);
	wait_until(task, is_kept, answer);
}

/* --- in the control process ------------------------------------------------------------------------- */

void scsi_shared_registrations(struct scsi_shared *shared, struct scsi_registration *out,
			       struct scsi_snapshot *snapshot)
{
	const struct scsi_state *state;

	shared_lock(shared);
	state = shared_state(shared);
	*snapshot = (struct scsi_snapshot){
	    .number = atomic_load(&shared->keep_asked),
	    .aptpl = state->aptpl,
	};
	for (uint32_t i = 0; i < SCSI_MAX_NEXUSES; i++) {
		const struct scsi_nexus *nexus = &state->nexus[i];
		bool holder = state->pr_type != PR_NONE && state->pr_holder == i;

		if (nexus->key != 0) {
			out[snapshot->count++] = (struct scsi_registration){
			    .initiator = nexus->initiator,
			    .target = nexus->target,
			    .key = nexus->key,
			    .port = nexus->port,
			    .holder = holder,
			    .type = holder ? state->pr_type : PR_NONE,
			};
		}
	}
	shared_unlock(shared);
}

void scsi_shared_kept(struct scsi_shared *shared, uint32_t number, bool failed)
{
	atomic_store(&shared->keep_failed, failed ? number : 0);
	atomic_store_explicit(&shared->keep_done, number, memory_order_release);
}

static int restore_one(struct scsi_shared *shared, struct scsi_state *state,
		       const struct scsi_registration *item)
{
	int place = nexus_find(state, item->initiator, item->target);

	if (item->holder && !pr_is_valid(item->type)) {
		return -EINVAL;
	}
	if (place < 0) {
		place = nexus_add(state, item->initiator, item->target, item->port);
	}
	if (place < 0) {
		return place;
	}
	atomic_store(&shared->attentions[place], 1u << SCSI_ATTENTION_POWER_ON);
	state->nexus[place].key = item->key;
	if (item->holder) {
		state->pr_holder = (uint32_t)place;
		state->pr_type = item->type;
	}
	return 0;
}

int scsi_shared_restore(struct scsi_shared *shared, const struct scsi_registration *items, uint32_t count)
{
	struct scsi_state *state;
	int rc = 0;

	shared_lock(shared);
	state = shared_edit(shared);
	for (uint32_t i = 0; i < count && rc == 0; i++) {
		rc = restore_one(shared, state, &items[i]);
	}
	if (rc == 0) {
		state->aptpl = true;
		shared_commit(shared);
	}
	shared_unlock(shared);
	return rc;
}
