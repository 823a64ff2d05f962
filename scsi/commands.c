#include "scsi/commands.h"

#include <stddef.h>
#include <string.h>

#include "scsi/spec.h"

/* Fields that many CDBs have. */
#define CONTROL 0x04 /* NACA */
#define GROUP 0x3f   /* GROUP NUMBER: accepted, and nothing is grouped */
#define BE16 0xff, 0xff
#define BE24 0xff, 0xff, 0xff
#define BE32 0xff, 0xff, 0xff, 0xff
#define BE64 BE32, BE32
#define ZERO16 0, 0
#define ZERO24 0, 0, 0
#define ZERO32 0, 0, 0, 0
#define ZERO64 ZERO32, ZERO32

/* A second: answered from memory. */
#define QUICK 1
/* As long as a slow disk may take for what one command can ask of it. */
#define IO_TIME 30
#define LONG_TIME 600
#define SANITIZE_TIME 7200

enum {
	ANY = ACCESS_ANY,
	PROBE = ACCESS_PROBE,
	READ = ACCESS_READ,
	CHANGE = ACCESS_CHANGE,
	NONE = 0,
	EARLY = COMMAND_ATTENTION_PASSES,
	UNITLESS = COMMAND_ATTENTION_PASSES | COMMAND_WITHOUT_UNIT | COMMAND_WELL_KNOWN | COMMAND_SANITIZING,
	CALM = COMMAND_SANITIZING,
	KNOWN = COMMAND_WELL_KNOWN,
	MEDIUM = COMMAND_MEDIUM,
	DPO_FUA = 0x18,
	PLAIN = NO_SERVICE_ACTION,
};

/* By operation code, then service action. */
static const struct scsi_command table[] = {
    {0x00, PLAIN, 6, PROBE, KNOWN | MEDIUM, QUICK, {0x00, 0, ZERO24, CONTROL}, run_test_unit_ready},
    {0x03, PLAIN, 6, ANY, UNITLESS, QUICK, {0x03, 0x01, ZERO16, 0xff, CONTROL}, run_request_sense},
    {0x08, PLAIN, 6, READ, MEDIUM, IO_TIME, {0x08, 0x1f, BE16, 0xff, CONTROL}, run_read_6},
    {0x0a, PLAIN, 6, CHANGE, MEDIUM, IO_TIME, {0x0a, 0x1f, BE16, 0xff, CONTROL}, run_write_6},
    {0x12, PLAIN, 6, ANY, UNITLESS, QUICK, {0x12, 0x01, 0xff, BE16, CONTROL}, run_inquiry},
    {0x15, PLAIN, 6, CHANGE, NONE, QUICK, {0x15, 0x11, ZERO16, 0xff, CONTROL}, run_mode_select_6},
    {0x16, PLAIN, 6, PROBE, NONE, QUICK, {0x16, 0, ZERO24, CONTROL}, run_reserve},
    {0x17, PLAIN, 6, ANY, NONE, QUICK, {0x17, 0, ZERO24, CONTROL}, run_release},
    {0x1a, PLAIN, 6, CHANGE, NONE, QUICK, {0x1a, 0x08, 0xff, BE16, CONTROL}, run_mode_sense_6},
    {0x1b, PLAIN, 6, CHANGE, NONE, IO_TIME, {0x1b, 0x01, 0, 0x0f, 0xf7, CONTROL}, run_start_stop},
    {0x1e, PLAIN, 6, ANY, NONE, QUICK, {0x1e, 0, ZERO16, 0x03, CONTROL}, run_prevent_allow},
    {0x25, PLAIN, 10, ANY, MEDIUM, QUICK, {0x25, 0, BE32, ZERO16, 0x01, CONTROL}, run_read_capacity_10},
    {0x28, PLAIN, 10, READ, MEDIUM, IO_TIME, {0x28, DPO_FUA, BE32, GROUP, BE16, CONTROL}, run_read_10},
    {0x2a, PLAIN, 10, CHANGE, MEDIUM, IO_TIME, {0x2a, DPO_FUA, BE32, GROUP, BE16, CONTROL}, run_write_10},
    {0x2e, PLAIN, 10, CHANGE, MEDIUM, IO_TIME, {0x2e, 0x16, BE32, GROUP, BE16, CONTROL}, run_write_verify_10},
    {0x2f, PLAIN, 10, READ, MEDIUM, IO_TIME, {0x2f, 0x16, BE32, GROUP, BE16, CONTROL}, run_verify_10},
    {0x34, PLAIN, 10, READ, MEDIUM, IO_TIME, {0x34, 0x02, BE32, GROUP, BE16, CONTROL}, run_prefetch_10},
    {0x35, PLAIN, 10, CHANGE, MEDIUM, IO_TIME, {0x35, 0x02, BE32, GROUP, BE16, CONTROL}, run_synchronize_10},
    {0x37, PLAIN, 10, READ, MEDIUM, QUICK, {0x37, 0, 0x1f, ZERO32, BE16, CONTROL}, run_read_defects_10},
    {0x41, PLAIN, 10, CHANGE, MEDIUM, LONG_TIME, {0x41, 0x18, BE32, GROUP, BE16, CONTROL}, run_write_same_10},
    {0x42, PLAIN, 10, CHANGE, MEDIUM, LONG_TIME, {0x42, 0, ZERO32, GROUP, BE16, CONTROL}, run_unmap},
    {0x48, 0x01, 10, CHANGE, NONE, SANITIZE_TIME, {0x48, 0xa1, ZERO32, 0, BE16, CONTROL}, run_sanitize},
    {0x48, 0x02, 10, CHANGE, NONE, SANITIZE_TIME, {0x48, 0xa2, ZERO32, 0, BE16, CONTROL}, run_sanitize},
    {0x48, 0x1f, 10, CHANGE, NONE, QUICK, {0x48, 0x9f, ZERO32, 0, BE16, CONTROL}, run_sanitize},
    {0x4d, PLAIN, 10, ANY, CALM, QUICK, {0x4d, 0x01, 0xff, 0xff, 0, ZERO16, BE16, CONTROL}, run_log_sense},
    {0x55, PLAIN, 10, CHANGE, NONE, QUICK, {0x55, 0x11, ZERO32, 0, BE16, CONTROL}, run_mode_select_10},
    {0x56, PLAIN, 10, PROBE, NONE, QUICK, {0x56, 0, ZERO32, ZERO24, CONTROL}, run_reserve},
    {0x57, PLAIN, 10, ANY, NONE, QUICK, {0x57, 0, ZERO32, ZERO24, CONTROL}, run_release},
    {0x5a, PLAIN, 10, CHANGE, NONE, QUICK, {0x5a, 0x18, 0xff, 0xff, ZERO24, BE16, CONTROL}, run_mode_sense_10},
    {0x5e, 0x00, 10, PROBE, NONE, QUICK, {0x5e, 0x00, ZERO32, 0, BE16, CONTROL}, run_persistent_in},
    {0x5e, 0x01, 10, PROBE, NONE, QUICK, {0x5e, 0x01, ZERO32, 0, BE16, CONTROL}, run_persistent_in},
    {0x5e, 0x02, 10, PROBE, NONE, QUICK, {0x5e, 0x02, ZERO32, 0, BE16, CONTROL}, run_persistent_in},
    {0x5e, 0x03, 10, PROBE, NONE, QUICK, {0x5e, 0x03, ZERO32, 0, BE16, CONTROL}, run_persistent_in},
    {0x5f, 0x00, 10, PROBE, NONE, QUICK, {0x5f, 0x00, 0xff, ZERO16, BE32, CONTROL}, run_persistent_out},
    {0x5f, 0x01, 10, PROBE, NONE, QUICK, {0x5f, 0x01, 0xff, ZERO16, BE32, CONTROL}, run_persistent_out},
    {0x5f, 0x02, 10, PROBE, NONE, QUICK, {0x5f, 0x02, 0xff, ZERO16, BE32, CONTROL}, run_persistent_out},
    {0x5f, 0x03, 10, PROBE, NONE, QUICK, {0x5f, 0x03, 0xff, ZERO16, BE32, CONTROL}, run_persistent_out},
    {0x5f, 0x04, 10, PROBE, NONE, QUICK, {0x5f, 0x04, 0xff, ZERO16, BE32, CONTROL}, run_persistent_out},
    {0x5f, 0x05, 10, PROBE, NONE, IO_TIME, {0x5f, 0x05, 0xff, ZERO16, BE32, CONTROL}, run_persistent_out},
    {0x5f, 0x06, 10, PROBE, NONE, QUICK, {0x5f, 0x06, 0xff, ZERO16, BE32, CONTROL}, run_persistent_out},
    {0x5f, 0x07, 10, PROBE, NONE, QUICK, {0x5f, 0x07, 0xff, ZERO16, BE32, CONTROL}, run_persistent_out},
    {0x83, 0x00, 16, CHANGE, MEDIUM, LONG_TIME, {0x83, 0x00, ZERO64, BE32, 0, CONTROL}, run_extended_copy},
    {0x84, 0x00, 16, READ, NONE, QUICK, {0x84, 0x00, 0xff, ZERO24, ZERO32, BE32, 0, CONTROL}, run_copy_results},
    {0x84, 0x03, 16, READ, NONE, QUICK, {0x84, 0x03, 0xff, ZERO24, ZERO32, BE32, 0, CONTROL}, run_copy_results},
    {0x84, 0x04, 16, READ, NONE, QUICK, {0x84, 0x04, 0xff, ZERO24, ZERO32, BE32, 0, CONTROL}, run_copy_results},
    {0x88, PLAIN, 16, READ, MEDIUM, IO_TIME, {0x88, DPO_FUA, BE64, BE32, GROUP, CONTROL}, run_read_16},
    {0x89,
     PLAIN,
     16,
     CHANGE,
     MEDIUM,
     IO_TIME,
     {0x89, DPO_FUA, BE64, ZERO24, 0xff, GROUP, CONTROL},
     run_compare_and_write},
    {0x8a, PLAIN, 16, CHANGE, MEDIUM, IO_TIME, {0x8a, DPO_FUA, BE64, BE32, GROUP, CONTROL}, run_write_16},
    {0x8b, PLAIN, 16, CHANGE, MEDIUM, IO_TIME, {0x8b, DPO_FUA, BE64, BE32, GROUP, CONTROL}, run_orwrite},
    {0x8e, PLAIN, 16, CHANGE, MEDIUM, IO_TIME, {0x8e, 0x16, BE64, BE32, GROUP, CONTROL}, run_write_verify_16},
    {0x8f, PLAIN, 16, READ, MEDIUM, IO_TIME, {0x8f, 0x16, BE64, BE32, GROUP, CONTROL}, run_verify_16},
    {0x90, PLAIN, 16, READ, MEDIUM, IO_TIME, {0x90, 0x02, BE64, BE32, GROUP, CONTROL}, run_prefetch_16},
    {0x91, PLAIN, 16, CHANGE, MEDIUM, IO_TIME, {0x91, 0x02, BE64, BE32, GROUP, CONTROL}, run_synchronize_16},
    {0x93, PLAIN, 16, CHANGE, MEDIUM, LONG_TIME, {0x93, 0x19, BE64, BE32, GROUP, CONTROL}, run_write_same_16},
    {0x9c,
     PLAIN,
     16,
     CHANGE,
     MEDIUM,
     IO_TIME,
     {0x9c, DPO_FUA, BE64, ZERO16, BE16, GROUP, CONTROL},
     run_write_atomic},
    {0x9e, 0x10, 16, ANY, MEDIUM, QUICK, {0x9e, 0x10, BE64, BE32, 0x01, CONTROL}, run_read_capacity_16},
    {0x9e, 0x12, 16, READ, MEDIUM, QUICK, {0x9e, 0x12, BE64, BE32, 0, CONTROL}, run_get_lba_status},
    {0xa0, PLAIN, 12, ANY, UNITLESS, QUICK, {0xa0, 0, 0xff, ZERO24, BE32, 0, CONTROL}, run_report_luns},
    {0xa3, 0x0a, 12, PROBE, NONE, QUICK, {0xa3, 0x2a, ZERO32, BE32, 0, CONTROL}, run_report_target_port_groups},
    {0xa3, 0x0c, 12, CHANGE, CALM, QUICK, {0xa3, 0x0c, 0x87, 0xff, BE16, BE32, 0, CONTROL}, run_report_opcodes},
    {0xa3,
     0x0d,
     12,
     CHANGE,
     CALM,
     QUICK,
     {0xa3, 0x0d, 0x80, ZERO24, BE32, 0, CONTROL},
     run_report_task_management},
    {0xa8, PLAIN, 12, READ, MEDIUM, IO_TIME, {0xa8, DPO_FUA, BE32, BE32, GROUP, CONTROL}, run_read_12},
    {0xaa, PLAIN, 12, CHANGE, MEDIUM, IO_TIME, {0xaa, DPO_FUA, BE32, BE32, GROUP, CONTROL}, run_write_12},
    {0xae, PLAIN, 12, CHANGE, MEDIUM, IO_TIME, {0xae, 0x16, BE32, BE32, GROUP, CONTROL}, run_write_verify_12},
    {0xaf, PLAIN, 12, READ, MEDIUM, IO_TIME, {0xaf, 0x16, BE32, BE32, GROUP, CONTROL}, run_verify_12},
    {0xb7, PLAIN, 12, READ, MEDIUM, QUICK, {0xb7, 0x1f, BE32, BE32, 0, CONTROL}, run_read_defects_12},
};

#define COMMANDS (sizeof(table) / sizeof(table[0]))

/* By operation code: the first, NULL: there is none. */
static const struct scsi_command *first[256];
struct scsi_usual scsi_usual[256];

static void index_usual(const struct scsi_command *command)
{
	uint8_t bits[16] = {0};

	for (unsigned byte = 1; byte < command->size; byte++) {
		bits[byte] = (uint8_t)~command->usage[byte];
	}
	memcpy(scsi_usual[command->opcode].forbidden, bits, sizeof(bits));
	scsi_usual[command->opcode].command = command;
}

__attribute__((constructor)) static void index_table(void)
{
	/* The operation code itself is a forbidden bit where nothing else is known; 00h is a command. */
	memset(scsi_usual, 0xff, sizeof(scsi_usual));
	for (unsigned i = COMMANDS; i-- > 0;) {
		first[table[i].opcode] = &table[i];
		if (table[i].service_action == NO_SERVICE_ACTION) {
			index_usual(&table[i]);
		}
	}
}

const struct scsi_command *command_find(const uint8_t *cdb, bool *known)
{
	const struct scsi_command *command = first[cdb[0]];

	*known = command != NULL;
	if (command == NULL || command->service_action == NO_SERVICE_ACTION) {
		return command;
	}
	for (; command < table + COMMANDS && command->opcode == cdb[0]; command++) {
		if (command->service_action == (cdb[1] & 0x1f)) {
			return command;
		}
	}
	return NULL;
}

const struct scsi_command *command_at(unsigned index)
{
	return index < COMMANDS ? &table[index] : NULL;
}

int command_bad_bit(const struct scsi_command *command, const uint8_t *cdb)
{
	for (int byte = 1; byte < command->size; byte++) {
		unsigned bad = cdb[byte] & ~command->usage[byte];

		if (bad != 0) {
			return byte * 8 + 31 - __builtin_clz(bad);
		}
	}
	return -1;
}
