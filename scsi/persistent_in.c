/* PERSISTENT RESERVE IN: SPC-5 section 6.16. */
#include "scsi/commands.h"
#include "scsi/persistent.h"
#include "scsi/task.h"

enum {
	READ_KEYS,
	READ_RESERVATION,
	REPORT_CAPABILITIES,
	READ_FULL_STATUS,
};

#define HEADER 8

static void reply(struct scsi_task *task, uint32_t length)
{
	put_be32(task->buffer + 4, length - HEADER);
	task_reply(task, task->buffer, length, get_be16(task->cdb + 7));
}

static uint32_t put_keys(const struct scsi_state *state, uint8_t *out)
{
	uint32_t length = 0;

	for (unsigned i = 0; i < SCSI_MAX_NEXUSES; i++) {
		if (state->nexus[i].key != 0) {
			put_be64(out + length, state->nexus[i].key);
			length += 8;
		}
	}
	return length;
}

static uint32_t put_reservation(const struct scsi_state *state, uint8_t *out)
{
	if (state->pr_type == PR_NONE) {
		return 0;
	}
	memset(out, 0, 16);
	put_be64(out, pr_is_all(state->pr_type) ? 0 : state->nexus[state->pr_holder].key);
	out[13] = state->pr_type; /* and scope: the logical unit */
	return 16;
}

static uint32_t put_status(const struct scsi_state *state, uint32_t nexus, uint8_t *out)
{
	const struct scsi_nexus *entry = &state->nexus[nexus];

	memset(out, 0, 24 + TRANSPORT_ID_SIZE);
	put_be64(out, entry->key);
	if (pr_is_holder(state, nexus)) {
		out[12] = 0x01; /* R_HOLDER */
		out[13] = state->pr_type;
	}
	put_be16(out + 18, entry->port);
	put_be32(out + 20, TRANSPORT_ID_SIZE);
	out[24] = PROTOCOL_SAS;
	put_be64(out + 28, entry->initiator);
	return 24 + TRANSPORT_ID_SIZE;
}

static uint32_t put_full_status(const struct scsi_state *state, uint8_t *out)
{
	uint32_t length = 0;

	for (uint32_t i = 0; i < SCSI_MAX_NEXUSES; i++) {
		if (state->nexus[i].key != 0) {
			length += put_status(state, i, out + length);
		}
	}
	return length;
}

static void report_capabilities(struct scsi_task *task)
{
	bool aptpl = shared_state(task->unit->shared)->aptpl;
	uint8_t data[8] = {
	    [1] = sizeof(data), [2] = task->unit->keeps, /* PTPL_C */
	    [3] = 0x80 | aptpl, /* PTPL_A; TMV: what follows says which types there are */
	    [4] = 0xea,		/* all but one of them, */
	    [5] = 0x01,		/* and exclusive access, all registrants */
	};

	task_reply(task, data, sizeof(data), get_be16(task->cdb + 7));
}

void run_persistent_in(struct scsi_task *task)
{
	struct scsi_shared *shared = task->unit->shared;
	const struct scsi_state *state;
	uint32_t length = 0;

	if (task->command->service_action == REPORT_CAPABILITIES) {
		report_capabilities(task);
		return;
	}
	shared_lock(shared);
	state = shared_state(shared);
	put_be32(task->buffer, state->pr_generation);
	switch (task->command->service_action) {
	case READ_KEYS:
		length = put_keys(state, task->buffer + HEADER);
		break;
	case READ_RESERVATION:
		length = put_reservation(state, task->buffer + HEADER);
		break;
	case READ_FULL_STATUS:
		length = put_full_status(state, task->buffer + HEADER);
		break;
	}
	shared_unlock(shared);
	task->buffer_used = length > 4096 - HEADER;
	reply(task, HEADER + length);
}
