/*
 * PERSISTENT RESERVE OUT: SPC-5 section 6.17. Each service action looks at the state, and either refuses or
 * changes a copy of it, which becomes the state when all of it is done.
 */
#include "scsi/commands.h"
#include "scsi/fence.h"
#include "scsi/persistent.h"
#include "scsi/task.h"

enum {
	REGISTER,
	RESERVE,
	RELEASE,
	CLEAR,
	PREEMPT,
	PREEMPT_AND_ABORT,
	REGISTER_AND_IGNORE,
	REGISTER_AND_MOVE,
};

#define LIST_SIZE 24
#define SPEC_I_PT 0x08
#define ALL_TG_PT 0x04
#define APTPL 0x01
#define UNREG 0x02

enum outcome {
	DONE,
	CONFLICT,
	BAD_RELEASE, /* INVALID RELEASE OF PERSISTENT RESERVATION */
	BAD_TYPE,    /* of the CDB: scope or type */
	BAD_KEY,     /* of the list: the service action reservation key */
	BAD_PORT,    /* of the list: a nexus that does not exist */
	BAD_ID,	     /* of the list: a TransportID of another form */
};

/* A request, and the state it is made of. */
struct request {
	struct scsi_shared *shared;
	struct scsi_state *state; /* the copy */
	const uint8_t *list;
	uint32_t nexus;
	uint32_t length; /* of the list */
	uint64_t key;
	uint64_t action_key;
	uint8_t type;
	uint8_t scope;
	struct fence_set preempted;
};

static uint64_t my_key(const struct request *request)
{
	return request->state->nexus[request->nexus].key;
}

static bool is_registered(const struct request *request)
{
	return my_key(request) != 0 && my_key(request) == request->key;
}

/* Registrants other than ourselves learn of it. */
static void tell_registrants(const struct request *request, enum scsi_attention attention)
{
	for (uint32_t i = 0; i < SCSI_MAX_NEXUSES; i++) {
		if (i != request->nexus && request->state->nexus[i].key != 0) {
			shared_attend(request->shared, i, attention);
		}
	}
}

static void release_reservation(struct request *request, bool tell)
{
	struct scsi_state *state = request->state;

	if (tell && state->pr_type >= PR_WRITE_EXCLUSIVE_REGISTRANTS) {
		tell_registrants(request, SCSI_ATTENTION_RESERVATIONS_RELEASED);
	}
	state->pr_type = PR_NONE;
	state->pr_holder = SCSI_NO_NEXUS;
}

/* Some registrant is named as the holder of a reservation of all; false if there is none left. */
static bool name_holder(struct scsi_state *state)
{
	for (uint32_t i = 0; i < SCSI_MAX_NEXUSES; i++) {
		if (state->nexus[i].key != 0) {
			state->pr_holder = i;
			return true;
		}
	}
	return false;
}

/* Section 5.14.11.2. */
static void unregister(struct request *request, uint32_t nexus)
{
	struct scsi_state *state = request->state;
	bool held = state->pr_type != PR_NONE && state->pr_holder == nexus;

	state->nexus[nexus].key = 0;
	if (held && !(pr_is_all(state->pr_type) && name_holder(state))) {
		release_reservation(request, true);
	}
}

static enum outcome do_register(struct request *request, bool ignore)
{
	if (!ignore && my_key(request) != request->key) {
		return CONFLICT;
	}
	if (request->action_key != 0) {
		request->state->nexus[request->nexus].key = request->action_key;
	} else if (my_key(request) != 0) {
		unregister(request, request->nexus);
	} else {
		return DONE;
	}
	request->state->pr_generation++;
	return DONE;
}

static enum outcome do_reserve(struct request *request)
{
	struct scsi_state *state = request->state;

	if (request->scope != 0 || !pr_is_valid(request->type)) {
		return BAD_TYPE;
	}
	if (!is_registered(request)) {
		return CONFLICT;
	}
	if (state->pr_type != PR_NONE) {
		bool same = pr_is_holder(state, request->nexus) && state->pr_type == request->type;

		return same ? DONE : CONFLICT;
	}
	state->pr_type = request->type;
	state->pr_holder = request->nexus;
	return DONE;
}

static enum outcome do_release(struct request *request)
{
	struct scsi_state *state = request->state;

	if (!is_registered(request)) {
		return CONFLICT;
	}
	if (!pr_is_holder(state, request->nexus)) {
		return DONE;
	}
	if (request->scope != 0 || request->type != state->pr_type) {
		return BAD_RELEASE;
	}
	release_reservation(request, true);
	return DONE;
}

static enum outcome do_clear(struct request *request)
{
	struct scsi_state *state = request->state;

	if (!is_registered(request)) {
		return CONFLICT;
	}
	tell_registrants(request, SCSI_ATTENTION_RESERVATIONS_PREEMPTED);
	for (uint32_t i = 0; i < SCSI_MAX_NEXUSES; i++) {
		state->nexus[i].key = 0;
	}
	release_reservation(request, false);
	state->pr_generation++;
	return DONE;
}

/* Remove the registrations with a key, or all (0); others' owners learn of it. Returns how many. */
static unsigned remove_registrations(struct request *request, uint64_t key, bool spare_myself)
{
	unsigned removed = 0;

	for (uint32_t i = 0; i < SCSI_MAX_NEXUSES; i++) {
		uint64_t its = request->state->nexus[i].key;

		if (its == 0 || (key != 0 && its != key) || (spare_myself && i == request->nexus)) {
			continue;
		}
		if (i != request->nexus) {
			shared_attend(request->shared, i, SCSI_ATTENTION_REGISTRATIONS_PREEMPTED);
			fence_set_add(&request->preempted, i);
		}
		unregister(request, i);
		removed++;
	}
	return removed;
}

/* Take the reservation over: section 5.14.11.4.3. */
static enum outcome preempt_reservation(struct request *request)
{
	struct scsi_state *state = request->state;
	uint8_t old = state->pr_type;

	if (request->scope != 0 || !pr_is_valid(request->type)) {
		return BAD_TYPE;
	}
	/* It passes to us in one step: nobody hears that it was released. */
	state->pr_type = PR_NONE;
	remove_registrations(request, request->action_key, true);
	if (old != request->type) {
		tell_registrants(request, SCSI_ATTENTION_RESERVATIONS_RELEASED);
	}
	state->pr_type = request->type;
	state->pr_holder = request->nexus;
	state->pr_generation++;
	return DONE;
}

static enum outcome do_preempt(struct request *request)
{
	struct scsi_state *state = request->state;
	bool all = pr_is_all(state->pr_type);

	if (!is_registered(request)) {
		return CONFLICT;
	}
	if (state->pr_type != PR_NONE &&
	    (all ? request->action_key == 0 : request->action_key == state->nexus[state->pr_holder].key)) {
		return preempt_reservation(request);
	}
	if (request->action_key == 0) {
		return BAD_KEY;
	}
	if (remove_registrations(request, request->action_key, false) == 0) {
		return CONFLICT;
	}
	state->pr_generation++;
	return DONE;
}

static int find_by_port(const struct scsi_state *state, uint64_t initiator, uint16_t port)
{
	for (int i = 0; i < SCSI_MAX_NEXUSES; i++) {
		const struct scsi_nexus *nexus = &state->nexus[i];

		if (nexus->used && nexus->initiator == initiator && nexus->port == port) {
			return i;
		}
	}
	return -1;
}

static enum outcome do_move(struct request *request)
{
	struct scsi_state *state = request->state;
	const uint8_t *id = request->list + LIST_SIZE;
	int to;

	if (!is_registered(request) || pr_is_all(state->pr_type) || !pr_is_holder(state, request->nexus)) {
		return CONFLICT;
	}
	if (request->action_key == 0) {
		return BAD_KEY;
	}
	if (id[0] != PROTOCOL_SAS) {
		return BAD_ID;
	}
	to = find_by_port(state, get_be64(id + 4), get_be16(request->list + 18));
	if (to < 0 || (uint32_t)to == request->nexus) {
		return BAD_PORT;
	}
	state->nexus[to].key = request->action_key;
	state->pr_holder = (uint32_t)to;
	if (request->list[17] & UNREG) {
		state->nexus[request->nexus].key = 0;
	}
	state->pr_generation++;
	return DONE;
}

static enum outcome act(struct request *request, unsigned action)
{
	switch (action) {
	case REGISTER:
	case REGISTER_AND_IGNORE:
		return do_register(request, action == REGISTER_AND_IGNORE);
	case RESERVE:
		return do_reserve(request);
	case RELEASE:
		return do_release(request);
	case CLEAR:
		return do_clear(request);
	case REGISTER_AND_MOVE:
		return do_move(request);
	default:
		return do_preempt(request);
	}
}

static void answer(struct scsi_task *task, const struct request *request, enum outcome outcome)
{
	switch (outcome) {
	case DONE:
		if (task->command->service_action == PREEMPT_AND_ABORT) {
			fence_wait(task, &request->preempted);
			return;
		}
		task_good(task);
		return;
	case CONFLICT:
		task_status(task, SCSI_RESERVATION_CONFLICT);
		return;
	case BAD_RELEASE:
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_INVALID_RELEASE);
		return;
	case BAD_TYPE:
		task_bad_cdb(task, 2, task->cdb[2] & 0xf0 ? 7 : 3);
		return;
	case BAD_KEY:
		task_bad_list(task, 8, -1);
		return;
	case BAD_PORT:
		task_bad_list(task, 18, -1);
		return;
	case BAD_ID:
		task_bad_list(task, LIST_SIZE, -1);
		return;
	}
}

/* Is the list what the service action wants? If not the task has ended. */
static bool check_list(struct scsi_task *task)
{
	bool move = task->command->service_action == REGISTER_AND_MOVE;
	uint32_t length = get_be32(task->cdb + 5);
	const uint8_t *list = task->buffer;

	if (move ? length != LIST_SIZE + TRANSPORT_ID_SIZE : length != LIST_SIZE) {
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_PARAMETER_LIST_LENGTH);
		return false;
	}
	if (!task_list(task, length)) {
		return false;
	}
	if (move) {
		if (get_be32(list + 20) != TRANSPORT_ID_SIZE) {
			task_bad_list(task, 20, -1);
		} else if (list[17] & APTPL) {
			task_bad_list(task, 17, 0);
		} else {
			return true;
		}
		return false;
	}
	if (list[20] & SPEC_I_PT) {
		task_bad_list(task, 20, 3);
	} else if (list[20] & ALL_TG_PT) {
		task_bad_list(task, 20, 2);
	} else if (list[20] & APTPL) {
		task_bad_list(task, 20, 0);
	} else {
		return true;
	}
	return false;
}

void run_persistent_out(struct scsi_task *task)
{
	struct scsi_shared *shared = task->unit->shared;
	struct request request = {
	    .shared = shared,
	    .list = task->buffer,
	    .nexus = task->unit->nexus,
	    .type = task->cdb[2] & 0x0f,
	    .scope = task->cdb[2] >> 4,
	};
	enum outcome outcome;

	if (!check_list(task)) {
		return;
	}
	request.key = get_be64(task->buffer);
	request.action_key = get_be64(task->buffer + 8);
	shared_lock(shared);
	request.state = shared_edit(shared);
	outcome = act(&request, (unsigned)task->command->service_action);
	if (outcome == DONE) {
		shared_commit(shared);
	}
	shared_unlock(shared);
	answer(task, &request, outcome);
}
