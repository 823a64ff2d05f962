/*
 * What the service actions of PERSISTENT RESERVE OUT do: SPC-5 sections 5.14 and 6.17. Each looks at the state,
 * and either refuses or changes it.
 */
#include "scsi/persistent.h"

static uint64_t my_key(const struct pr_request *request)
{
	return request->state->nexus[request->nexus].key;
}

static bool is_registered(const struct pr_request *request)
{
	return my_key(request) != 0 && my_key(request) == request->key;
}

/* Registrants other than ourselves learn of it. */
static void tell_registrants(const struct pr_request *request, enum scsi_attention attention)
{
	for (uint32_t i = 0; i < SCSI_MAX_NEXUSES; i++) {
		if (i != request->nexus && request->state->nexus[i].key != 0) {
			shared_attend(request->shared, i, attention);
		}
	}
}

static void release_reservation(struct pr_request *request, bool tell)
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
static void unregister(struct pr_request *request, uint32_t nexus)
{
	struct scsi_state *state = request->state;
	bool held = state->pr_type != PR_NONE && state->pr_holder == nexus;

	nexus_unregister(state, nexus);
	if (held && !(pr_is_all(state->pr_type) && name_holder(state))) {
		release_reservation(request, true);
	}
}

static enum pr_outcome do_register(struct pr_request *request, bool ignore)
{
	if (!ignore && my_key(request) != request->key) {
		return PR_CONFLICT;
	}
	/* The last one to register says what is to survive a loss of power (section 6.17.3, APTPL). */
	request->state->aptpl = request->aptpl;
	if (request->action_key != 0) {
		request->state->nexus[request->nexus].key = request->action_key;
	} else if (my_key(request) != 0) {
		unregister(request, request->nexus);
	} else {
		return PR_DONE;
	}
	request->state->pr_generation++;
	return PR_DONE;
}

static enum pr_outcome do_reserve(struct pr_request *request)
{
	struct scsi_state *state = request->state;

	if (request->scope != 0 || !pr_is_valid(request->type)) {
		return PR_BAD_TYPE;
	}
	if (!is_registered(request)) {
		return PR_CONFLICT;
	}
	if (state->pr_type != PR_NONE) {
		bool same = pr_is_holder(state, request->nexus) && state->pr_type == request->type;

		return same ? PR_DONE : PR_CONFLICT;
	}
	state->pr_type = request->type;
	state->pr_holder = request->nexus;
	return PR_DONE;
}

static enum pr_outcome do_release(struct pr_request *request)
{
	struct scsi_state *state = request->state;

	if (!is_registered(request)) {
		return PR_CONFLICT;
	}
	if (!pr_is_holder(state, request->nexus)) {
		return PR_DONE;
	}
	if (request->scope != 0 || request->type != state->pr_type) {
		return PR_BAD_RELEASE;
	}
	release_reservation(request, true);
	return PR_DONE;
}

static enum pr_outcome do_clear(struct pr_request *request)
{
	struct scsi_state *state = request->state;

	if (!is_registered(request)) {
		return PR_CONFLICT;
	}
	tell_registrants(request, SCSI_ATTENTION_RESERVATIONS_PREEMPTED);
	for (uint32_t i = 0; i < SCSI_MAX_NEXUSES; i++) {
		if (state->nexus[i].key != 0) {
			nexus_unregister(state, i);
		}
	}
	release_reservation(request, false);
	state->pr_generation++;
	return PR_DONE;
}

/* Remove the registrations with a key, or all (0); others' owners learn of it. Returns how many. */
static unsigned remove_registrations(struct pr_request *request, uint64_t key, bool spare_myself)
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
static enum pr_outcome preempt_reservation(struct pr_request *request)
{
	struct scsi_state *state = request->state;
	uint8_t old = state->pr_type;

	if (request->scope != 0 || !pr_is_valid(request->type)) {
		return PR_BAD_TYPE;
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
	return PR_DONE;
}

static enum pr_outcome do_preempt(struct pr_request *request)
{
	struct scsi_state *state = request->state;
	bool all = pr_is_all(state->pr_type);

	if (!is_registered(request)) {
		return PR_CONFLICT;
	}
	if (state->pr_type != PR_NONE &&
	    (all ? request->action_key == 0 : request->action_key == state->nexus[state->pr_holder].key)) {
		return preempt_reservation(request);
	}
	if (request->action_key == 0) {
		return PR_BAD_KEY;
	}
	if (remove_registrations(request, request->action_key, false) == 0) {
		return PR_CONFLICT;
	}
	state->pr_generation++;
	return PR_DONE;
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

static enum pr_outcome do_move(struct pr_request *request)
{
	struct scsi_state *state = request->state;
	const uint8_t *id = request->list + PR_LIST_SIZE;
	int to;

	if (!is_registered(request) || pr_is_all(state->pr_type) || !pr_is_holder(state, request->nexus)) {
		return PR_CONFLICT;
	}
	if (request->action_key == 0) {
		return PR_BAD_KEY;
	}
	if (id[0] != PROTOCOL_SAS) {
		return PR_BAD_ID;
	}
	to = find_by_port(state, get_be64(id + 4), get_be16(request->list + 18));
	if (to < 0 || (uint32_t)to == request->nexus) {
		return PR_BAD_PORT;
	}
	state->nexus[to].key = request->action_key;
	state->pr_holder = (uint32_t)to;
	if (request->list[17] & PR_UNREG) {
		nexus_unregister(state, request->nexus);
	}
	state->aptpl = request->aptpl;
	state->pr_generation++;
	return PR_DONE;
}

enum pr_outcome pr_act(struct pr_request *request, unsigned action)
{
	switch (action) {
	case PR_REGISTER:
	case PR_REGISTER_AND_IGNORE:
		return do_register(request, action == PR_REGISTER_AND_IGNORE);
	case PR_RESERVE:
		return do_reserve(request);
	case PR_RELEASE:
		return do_release(request);
	case PR_CLEAR:
		return do_clear(request);
	case PR_REGISTER_AND_MOVE:
		return do_move(request);
	default:
		return do_preempt(request);
	}
}
