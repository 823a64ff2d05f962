/* RECEIVE COPY RESULTS: SPC-5 sections 6.20 to 6.24. Of each nexus the last copy is remembered. */
#include "scsi/commands.h"
#include "scsi/copy.h"
#include "scsi/task.h"

enum {
	COPY_STATUS = 0x00,
	OPERATING_PARAMETERS = 0x03,
	FAILED_SEGMENT = 0x04,
};

static void reply(struct scsi_task *task, uint8_t *data, uint32_t length)
{
	put_be32(data, length - 4);
	task_reply(task, data, length, get_be32(task->cdb + 10));
}

static void operating_parameters(struct scsi_task *task)
{
	uint8_t data[46] = {[4] = 0x01}; /* SNLID: copies without a list identifier, too */

	put_be16(data + 8, COPY_MAX_CSCDS);
	put_be16(data + 10, COPY_MAX_SEGMENTS);
	put_be32(data + 12, COPY_MAX_LIST);
	put_be16(data + 34, UINT16_MAX); /* copies at a time: as many as commands */
	data[36] = UINT8_MAX;
	data[37] = 9; /* granularity of data: 512 bytes */
	data[43] = 2; /* descriptor types, in their order */
	data[44] = COPY_BLOCK_TO_BLOCK;
	data[45] = COPY_IDENTIFICATION;
	reply(task, data, sizeof(data));
}

static void copy_status(struct scsi_task *task, const struct scsi_copy_result *result)
{
	uint8_t data[12] = {[4] = (uint8_t)(result->status - COPY_UNDER_WAY)};

	put_be16(data + 5, result->segments);
	/* The transfer count is in bytes, or in KiB where four bytes are not enough for that. */
	data[7] = result->moved > UINT32_MAX;
	put_be32(data + 8, (uint32_t)(data[7] ? result->moved >> 10 : result->moved));
	reply(task, data, sizeof(data));
}

static void failed_segment(struct scsi_task *task, const struct scsi_copy_result *result)
{
	uint8_t data[60 + SCSI_SENSE_SIZE] = {0};

	if (result->status != COPY_FAILED) {
		task_reply(task, data, 4, get_be32(task->cdb + 10));
		return;
	}
	data[56] = SCSI_CHECK_CONDITION;
	put_be16(data + 58, result->sense_length);
	memcpy(data + 60, result->sense, result->sense_length);
	reply(task, data, 60u + result->sense_length);
}

/*
 * The status of a copy that is over is told once, and that of one that has failed was told with its sense data
 * (section 6.20: discarded, after a vendor specific period or when it was received).
 */
static struct scsi_copy_result take_result(struct scsi_task *task, bool status)
{
	struct scsi_shared *shared = task->unit->shared;
	struct scsi_copy_result *kept = &shared->copies[task->unit->nexus];
	struct scsi_copy_result result;

	shared_lock(shared);
	result = *kept;
	if (status && result.status == COPY_FAILED) {
		result.status = COPY_NONE;
	} else if (status && result.status == COPY_DONE && result.list == task->cdb[2]) {
		kept->status = COPY_NONE;
	}
	shared_unlock(shared);
	return result;
}

void run_copy_results(struct scsi_task *task)
{
	struct scsi_copy_result result;

	if (task->command->service_action == OPERATING_PARAMETERS) {
		operating_parameters(task);
		return;
	}
	result = take_result(task, task->command->service_action == COPY_STATUS);
	if (result.status == COPY_NONE || result.list != task->cdb[2]) {
		task_bad_cdb(task, 2, -1);
	} else if (task->command->service_action == FAILED_SEGMENT) {
		failed_segment(task, &result);
	} else {
		copy_status(task, &result);
	}
}

/* --- VPD page 8Fh, section 7.7.18 -------------------------------------------------------------------- */

static unsigned put_descriptor(uint8_t *out, uint16_t type, const uint8_t *data, unsigned length)
{
	unsigned padded = (length + 3) & ~3u;

	put_be16(out, type);
	put_be16(out + 2, (uint16_t)padded);
	memset(out + 4, 0, padded);
	memcpy(out + 4, data, length);
	return 4 + padded;
}

unsigned copy_page(uint8_t *out)
{
	/* Operation codes with their service actions; the first byte is how much follows. */
	static const uint8_t commands[] = {
	    8, 0x83, 1, 0x00, 0x84, 3, COPY_STATUS, OPERATING_PARAMETERS, FAILED_SEGMENT};
	static const uint8_t types[] = {2, COPY_BLOCK_TO_BLOCK, COPY_IDENTIFICATION};
	static const uint8_t no_ids[] = {0, 0}; /* CSCD IDs beside indexes: none */
	uint8_t parameters[28] = {0};
	uint8_t general[32] = {0};
	unsigned length;

	put_be16(parameters + 4, COPY_MAX_CSCDS);
	put_be16(parameters + 6, COPY_MAX_SEGMENTS);
	put_be32(parameters + 8, COPY_MAX_LIST);
	put_be32(general, UINT16_MAX); /* copies at a time, */
	put_be32(general + 4, 1);      /* of which are remembered, for each nexus */
	general[12] = 9;	       /* granularity of data: 512 bytes */
	length = put_descriptor(out, 0x0001, commands, sizeof(commands));
	length += put_descriptor(out + length, 0x0004, parameters, sizeof(parameters));
	length += put_descriptor(out + length, 0x0008, types, sizeof(types));
	length += put_descriptor(out + length, 0x000c, no_ids, sizeof(no_ids));
	return length + put_descriptor(out + length, 0x8001, general, sizeof(general));
}
