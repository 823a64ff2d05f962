/*
 * The table of commands: what each is called, how its CDB may look, what it needs, and who executes it. To
 * add a command is to add an entry and a function.
 */
#ifndef SCSI_COMMANDS_H
#define SCSI_COMMANDS_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "scsi/unit.h"

struct scsi_task;

enum scsi_command_flags {
	COMMAND_ATTENTION_PASSES = 0x1, /* executed while a unit attention condition waits */
	COMMAND_WITHOUT_UNIT = 0x2,	/* has an answer where there is no logical unit */
	COMMAND_WELL_KNOWN = 0x4,	/* of the REPORT LUNS well-known logical unit too */
	COMMAND_MEDIUM = 0x8,		/* needs a unit that was not stopped */
	COMMAND_SANITIZING = 0x10,	/* executed while the medium is being sanitized, or could not be */
};

#define NO_SERVICE_ACTION (-1)

struct scsi_command {
	uint8_t opcode;
	int16_t service_action;
	uint8_t size;	/* of the CDB */
	uint8_t access; /* enum scsi_access */
	uint8_t flags;
	uint16_t timeout; /* seconds that it may take: of REPORT SUPPORTED OPERATION CODES */
	/*
	 * Which bits of the CDB are looked at (SPC-5, "CDB usage data"); any other bit must be zero. Byte 0
	 * is the operation code, and the service action is given in full.
	 */
	uint8_t usage[16];
	void (*run)(struct scsi_task *task);
};

/* Commands without service action, by operation code: one look tells that a CDB is well-formed. */
struct scsi_usual {
	const struct scsi_command *command;
	uint64_t forbidden[2]; /* of 16 bytes of the CDB the bits that must be zero; of other codes some that
				  are not */
};

extern struct scsi_usual scsi_usual[256];

/* The entry of a well-formed CDB, or NULL: then ask the two below. */
static inline const struct scsi_command *command_usual(const uint8_t *cdb)
{
	const struct scsi_usual *usual = &scsi_usual[cdb[0]];
	uint64_t asked[2];

	memcpy(asked, cdb, sizeof(asked));
	if (__builtin_expect((asked[0] & usual->forbidden[0]) | (asked[1] & usual->forbidden[1]), 0)) {
		return NULL;
	}
	return usual->command;
}

/* The entry of a CDB, or NULL. *@known: another service action of the operation code exists. */
const struct scsi_command *command_find(const uint8_t *cdb, bool *known);
/* Entry @index of the table, in the order of operation codes; NULL past the end. */
const struct scsi_command *command_at(unsigned index);
/* The first bit of @cdb that the entry does not allow: byte * 8 + bit, or -1. */
int command_bad_bit(const struct scsi_command *command, const uint8_t *cdb);

/* Executors, by the file that they are in. */
void run_test_unit_ready(struct scsi_task *task); /* unit.c's readiness was checked: report.c */
void run_request_sense(struct scsi_task *task);
void run_report_luns(struct scsi_task *task);
void run_report_opcodes(struct scsi_task *task);
void run_report_task_management(struct scsi_task *task);
void run_report_target_port_groups(struct scsi_task *task);

void run_inquiry(struct scsi_task *task);   /* inquiry.c */
void run_log_sense(struct scsi_task *task); /* log.c */

void run_mode_sense_6(struct scsi_task *task); /* mode.c */
void run_mode_sense_10(struct scsi_task *task);
void run_mode_select_6(struct scsi_task *task);
void run_mode_select_10(struct scsi_task *task);

void run_read_6(struct scsi_task *task); /* block.c */
void run_read_10(struct scsi_task *task);
void run_read_12(struct scsi_task *task);
void run_read_16(struct scsi_task *task);
void run_write_6(struct scsi_task *task);
void run_write_10(struct scsi_task *task);
void run_write_12(struct scsi_task *task);
void run_write_16(struct scsi_task *task);
void run_synchronize_10(struct scsi_task *task);
void run_synchronize_16(struct scsi_task *task);

void run_read_capacity_10(struct scsi_task *task); /* medium.c */
void run_read_capacity_16(struct scsi_task *task);
void run_get_lba_status(struct scsi_task *task);
void run_prefetch_10(struct scsi_task *task);
void run_prefetch_16(struct scsi_task *task);
void run_start_stop(struct scsi_task *task);
void run_prevent_allow(struct scsi_task *task);
void run_read_defects_10(struct scsi_task *task);
void run_read_defects_12(struct scsi_task *task);

void run_unmap(struct scsi_task *task); /* provision.c */
void run_write_same_10(struct scsi_task *task);
void run_write_same_16(struct scsi_task *task);

void run_verify_10(struct scsi_task *task); /* verify.c */
void run_verify_12(struct scsi_task *task);
void run_verify_16(struct scsi_task *task);
void run_write_verify_10(struct scsi_task *task);
void run_write_verify_12(struct scsi_task *task);
void run_write_verify_16(struct scsi_task *task);

void run_compare_and_write(struct scsi_task *task); /* atomic.c */
void run_write_atomic(struct scsi_task *task);
void run_orwrite(struct scsi_task *task);

void run_sanitize(struct scsi_task *task); /* sanitize.c */

void run_extended_copy(struct scsi_task *task); /* copy.c */
void run_copy_results(struct scsi_task *task);	/* copy_results.c */

void run_reserve(struct scsi_task *task); /* reserve.c */
void run_release(struct scsi_task *task);
void run_persistent_in(struct scsi_task *task);	 /* persistent_in.c */
void run_persistent_out(struct scsi_task *task); /* persistent_out.c */

#endif
