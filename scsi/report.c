/* What a target says of its units and itself: SPC-5 sections 6.35 to 6.42, and of their readiness. */
#include "scsi/commands.h"
#include "scsi/limits.h"
#include "scsi/sanitize.h"
#include "scsi/sense.h"
#include "scsi/task.h"

void run_test_unit_ready(struct scsi_task *task)
{
	task_good(task); /* it would not have come here otherwise */
}

void run_request_sense(struct scsi_task *task)
{
	struct sense sense = {.key = KEY_NO_SENSE};
	uint8_t data[SCSI_SENSE_SIZE];
	uint8_t length;

	if (task->unit == NULL) {
		if (!task->well_known) {
			sense.key = KEY_ILLEGAL_REQUEST;
			sense.asc = ASC_UNIT_NOT_SUPPORTED;
		}
	} else {
		sense.asc = unit_take_attention(task->unit);
		if (sense.asc != 0) {
			sense.key = KEY_UNIT_ATTENTION;
		} else if (task->unit->sanitize != SCSI_SANITIZE_NONE) {
			sanitize_sense(task->unit, &sense);
		} else if (task->unit->stopped) {
			sense.key = KEY_NOT_READY;
			sense.asc = ASC_NOT_READY_INITIALIZING_COMMAND;
		}
	}
	length = sense_write(&sense, task->cdb[1] & 1, data);
	task_reply(task, data, length, task->cdb[4]);
}

/* --- REPORT LUNS ------------------------------------------------------------------------------------ */

enum report_luns {
	REPORT_ADDRESSED = 0x00, /* all but well-known ones */
	REPORT_WELL_KNOWN = 0x01,
	REPORT_ALL = 0x02,
	REPORT_ADMINISTRATIVE = 0x10,
	REPORT_TOP_LEVEL = 0x11,
	REPORT_SUBSIDIARY = 0x12,
};

#define WELL_KNOWN_REPORT_LUNS 0xc101

void run_report_luns(struct scsi_task *task)
{
	const struct scsi_target *target = task->target;
	uint8_t select = task->cdb[2];
	uint8_t *out = task->buffer;
	uint32_t length = 8;

	if (select > REPORT_ALL && (select < REPORT_ADMINISTRATIVE || select > REPORT_SUBSIDIARY)) {
		task_bad_cdb(task, 2, 7);
		return;
	}
	if (get_be32(task->cdb + 6) < 16) {
		task_bad_cdb(task, 6, 7);
		return;
	}
	memset(out, 0, 8 + 8 * (SCSI_MAX_UNITS + 1));
	for (unsigned lun = 0; lun < SCSI_MAX_UNITS; lun++) {
		struct scsi_unit *unit = target->units[lun];

		if (unit == NULL || unit->bdev == NULL) {
			continue;
		}
		unit_clear_attention(unit, SCSI_ATTENTION_LUNS_CHANGED);
		if (select == REPORT_ADDRESSED || select == REPORT_ALL) {
			out[length + 1] = (uint8_t)lun; /* peripheral device addressing */
			length += 8;
		}
	}
	if (select == REPORT_WELL_KNOWN || select == REPORT_ALL) {
		put_be16(out + length, WELL_KNOWN_REPORT_LUNS);
		length += 8;
	}
	put_be32(out, length - 8);
	task_reply(task, out, length, get_be32(task->cdb + 6));
}

/* --- REPORT SUPPORTED OPERATION CODES ---------------------------------------------------------------- */

#define TIMEOUTS_SIZE 12
#define SUPPORTED_AS_STANDARD 3
#define NOT_SUPPORTED 1

static uint8_t *put_timeouts(uint8_t *out, const struct scsi_command *command)
{
	memset(out, 0, TIMEOUTS_SIZE);
	put_be16(out, TIMEOUTS_SIZE - 2);
	put_be32(out + 4, command->timeout); /* nominal */
	put_be32(out + 8, 2u * command->timeout);
	return out + TIMEOUTS_SIZE;
}

static void report_all(struct scsi_task *task, bool timeouts)
{
	uint8_t *out = task->buffer + 4;
	const struct scsi_command *command;

	for (unsigned i = 0; (command = command_at(i)) != NULL; i++) {
		bool actions = command->service_action != NO_SERVICE_ACTION;

		memset(out, 0, 8);
		out[0] = command->opcode;
		put_be16(out + 2, actions ? (uint16_t)command->service_action : 0);
		out[5] = (uint8_t)((timeouts ? 0x02 : 0) | (actions ? 0x01 : 0));
		put_be16(out + 6, command->size);
		out += 8;
		if (timeouts) {
			out = put_timeouts(out, command);
		}
	}
	put_be32(task->buffer, (uint32_t)(out - task->buffer) - 4);
	task_reply(task, task->buffer, (uint64_t)(out - task->buffer), get_be32(task->cdb + 6));
}

static void report_one(struct scsi_task *task, const struct scsi_command *command, bool timeouts)
{
	uint8_t *out = task->buffer;

	memset(out, 0, 4);
	if (command == NULL) {
		out[1] = NOT_SUPPORTED;
		task_reply(task, out, 4, get_be32(task->cdb + 6));
		return;
	}
	out[1] = (uint8_t)((timeouts ? 0x80 : 0) | SUPPORTED_AS_STANDARD);
	put_be16(out + 2, command->size);
	memcpy(out + 4, command->usage, command->size);
	out += 4 + command->size;
	if (timeouts) {
		out = put_timeouts(out, command);
	}
	task_reply(task, task->buffer, (uint64_t)(out - task->buffer), get_be32(task->cdb + 6));
}

/* The first entry of an operation code, and the one with a service action, or NULL. */
static const struct scsi_command *find(uint8_t opcode, uint16_t action, const struct scsi_command **any)
{
	const struct scsi_command *command;

	*any = NULL;
	for (unsigned i = 0; (command = command_at(i)) != NULL; i++) {
		if (command->opcode != opcode) {
			continue;
		}
		*any = command;
		if (command->service_action == NO_SERVICE_ACTION ? action == 0
								 : command->service_action == action) {
			return command;
		}
	}
	return NULL;
}

void run_report_opcodes(struct scsi_task *task)
{
	unsigned option = task->cdb[2] & 7;
	bool timeouts = task->cdb[2] & 0x80; /* RCTD */
	const struct scsi_command *any;
	const struct scsi_command *command = find(task->cdb[3], get_be16(task->cdb + 4), &any);
	bool actions = any != NULL && any->service_action != NO_SERVICE_ACTION;

	switch (option) {
	case 0:
		report_all(task, timeouts);
		break;
	case 1: /* an operation code that has no service actions */
		if (actions) {
			task_bad_cdb(task, 2, 2);
			break;
		}
		report_one(task, any, timeouts);
		break;
	case 2: /* one that has */
		if (any != NULL && !actions) {
			task_bad_cdb(task, 2, 2);
			break;
		}
		report_one(task, command, timeouts);
		break;
	case 3: /* either */
		report_one(task, command, timeouts);
		break;
	default:
		task_bad_cdb(task, 2, 2);
	}
}

void run_report_task_management(struct scsi_task *task)
{
	uint8_t data[16] = {
	    0xfc, /* ABORT TASK, ABORT TASK SET, CLEAR ACA, CLEAR TASK SET, LOGICAL UNIT RESET, QUERY TASK */
	    0x03, /* QUERY TASK SET, I_T NEXUS RESET */
	};
	bool extended = task->cdb[2] & 0x80; /* REPD; the timeouts it adds are not indicated */

	if (get_be32(task->cdb + 6) < 4) {
		task_bad_cdb(task, 6, 7);
		return;
	}
	data[3] = extended ? sizeof(data) - 4 : 0;
	task_reply(task, data, extended ? sizeof(data) : 4, get_be32(task->cdb + 6));
}

void run_report_target_port_groups(struct scsi_task *task)
{
	unsigned header = task->cdb[1] & 0x20 ? 8 : 4; /* the extended one has an implicit transition time */
	uint8_t data[8 + 12] = {0};
	uint8_t *group = data + header;

	put_be32(data, header - 4 + 12);
	if (header == 8) {
		data[4] = 0x10;
	}
	group[1] = 0x01; /* AO_SUP: always active and optimized */
	put_be16(group + 2, SCSI_PORT_GROUP);
	group[7] = 1;
	put_be16(group + 10, task->target->ports.relative);
	task_reply(task, data, header + 12, get_be32(task->cdb + 6));
}
