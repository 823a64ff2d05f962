/* A command made by Python, one at a time: for tests, and for whoever asks a unit outside of a queue. */
#ifndef SCSI_EXEC_H
#define SCSI_EXEC_H

#include "scsi/task.h"

/* cffi: begin */
struct scsi_buffer {
	void *address;
	uint64_t length;
};

struct scsi_exec_setup {
	uint64_t id;  /* source of the notice */
	uint32_t lun; /* SCSI_MAX_UNITS: the REPORT LUNS well-known logical unit */
	uint8_t cdb[SCSI_CDB_SIZE];
	uint8_t attribute; /* enum scsi_attribute */
	bool again;	   /* comes from the in-flight log */
	uint64_t tag;
	const struct scsi_buffer *out;
	const struct scsi_buffer *in;
	uint32_t out_count;
	uint32_t in_count;
};

struct scsi_outcome {
	uint8_t status; /* enum scsi_status */
	uint8_t sense_length;
	bool overrun;
	uint64_t transferred; /* bytes */
	uint8_t sense[SCSI_SENSE_SIZE];
};

struct scsi_exec;

/*
 * Start a command; it may have completed on return. NOTICE_DRAINED from @id follows when it has. The
 * buffers stay until then. NULL and errno: ENOMEM.
 */
struct scsi_exec *scsi_exec_start(struct reactor *reactor, struct scsi_target *target,
				  const struct scsi_exec_setup *setup);
bool scsi_exec_done(const struct scsi_exec *exec);
/* Once done. */
void scsi_exec_outcome(const struct scsi_exec *exec, struct scsi_outcome *outcome);
/* Free one that is done: 0, or -EBUSY (and nothing happens) when it is not. */
int scsi_exec_free(struct scsi_exec *exec);
/* cffi: end */

#endif
