/*
 * RESERVE and RELEASE as SPC-2 had them, for those who do without persistent reservations: where there are
 * registrations they conflict (SPC-5 section 5.14.3, with CRH zero).
 */
#include "scsi/commands.h"
#include "scsi/task.h"

static bool has_registrations(const struct scsi_state *state)
{
	for (unsigned i = 0; i < SCSI_MAX_NEXUSES; i++) {
		if (state->nexus[i].key != 0) {
			return true;
		}
	}
	return false;
}

void run_reserve(struct scsi_task *task)
{
	struct scsi_shared *shared = task->unit->shared;
	uint32_t nexus = task->unit->nexus;
	const struct scsi_state *state;
	bool conflict;

	shared_lock(shared);
	state = shared_state(shared);
	conflict =
	    (state->reserved_by != SCSI_NO_NEXUS && state->reserved_by != nexus) || has_registrations(state);
	if (!conflict && state->reserved_by != nexus) {
		shared_edit(shared)->reserved_by = nexus;
		shared_commit(shared);
	}
	shared_unlock(shared);
	task_status(task, conflict ? SCSI_RESERVATION_CONFLICT : SCSI_GOOD);
}

void run_release(struct scsi_task *task)
{
	struct scsi_shared *shared = task->unit->shared;
	bool conflict;

	shared_lock(shared);
	conflict = has_registrations(shared_state(shared));
	/* A release by whoever does not hold it changes nothing, and is no error (SPC-2 section 7.19). */
	if (!conflict && shared_state(shared)->reserved_by == task->unit->nexus) {
		shared_edit(shared)->reserved_by = SCSI_NO_NEXUS;
		shared_commit(shared);
	}
	shared_unlock(shared);
	task_status(task, conflict ? SCSI_RESERVATION_CONFLICT : SCSI_GOOD);
}
