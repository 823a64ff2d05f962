/* What the two halves of persistent reservations share: SPC-5 sections 5.14, 6.16 and 6.17. */
#ifndef SCSI_PERSISTENT_H
#define SCSI_PERSISTENT_H

#include <stdbool.h>
#include <stdint.h>

#include "scsi/fence.h"
#include "scsi/shared.h"
#include "scsi/spec.h"

#define PROTOCOL_SAS 0x6
#define TRANSPORT_ID_SIZE 24 /* SPC-5 section 7.6.4.6 */

static inline bool pr_is_valid(uint8_t type)
{
	return type == PR_WRITE_EXCLUSIVE || type == PR_EXCLUSIVE_ACCESS ||
	       (type >= PR_WRITE_EXCLUSIVE_REGISTRANTS && type <= PR_EXCLUSIVE_ACCESS_ALL);
}

/* Every registrant holds the reservation. */
static inline bool pr_is_all(uint8_t type)
{
	return type == PR_WRITE_EXCLUSIVE_ALL || type == PR_EXCLUSIVE_ACCESS_ALL;
}

static inline bool pr_is_holder(const struct scsi_state *state, uint32_t nexus)
{
	if (state->pr_type == PR_NONE) {
		return false;
	}
	return pr_is_all(state->pr_type) ? state->nexus[nexus].key != 0 : state->pr_holder == nexus;
}

/* --- PERSISTENT RESERVE OUT: persistent_act.c, for persistent_out.c -------------------------------------- */

/* Service actions, SPC-5 section 6.17.2. */
enum pr_action {
	PR_REGISTER,
	PR_RESERVE,
	PR_RELEASE,
	PR_CLEAR,
	PR_PREEMPT,
	PR_PREEMPT_AND_ABORT,
	PR_REGISTER_AND_IGNORE,
	PR_REGISTER_AND_MOVE,
};

#define PR_LIST_SIZE 24 /* of the parameter list, without TransportIDs */
#define PR_UNREG 0x02

enum pr_outcome {
	PR_DONE,
	PR_CONFLICT,
	PR_BAD_RELEASE, /* INVALID RELEASE OF PERSISTENT RESERVATION */
	PR_BAD_TYPE,	/* of the CDB: scope or type */
	PR_BAD_KEY,	/* of the list: the service action reservation key */
	PR_BAD_PORT,	/* of the list: a nexus that does not exist */
	PR_BAD_ID,	/* of the list: a TransportID of another form */
};

/* A request, and the state it is made of. */
struct pr_request {
	struct scsi_shared *shared;
	struct scsi_state *state; /* the copy */
	const uint8_t *list;
	uint32_t nexus;
	uint32_t length; /* of the list */
	uint64_t key;
	uint64_t action_key;
	uint8_t type;
	uint8_t scope;
	bool aptpl;
	uint32_t kept; /* number of the change, where it must be on disk */
	struct fence_set preempted;
};

/* Change request->state as the service action wants it, or say why not; then it must not become current. */
enum pr_outcome pr_act(struct pr_request *request, unsigned action);

#endif
