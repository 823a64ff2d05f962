/*
 * A task: one command of one initiator, from its CDB to its status and sense data. It lies in memory that
 * the transport has set aside for it, and points at the initiator's own buffers.
 */
#ifndef SCSI_TASK_H
#define SCSI_TASK_H

#include "bdev/bdev.h"
#include "bdev/ranges.h"
#include "scsi/spec.h"
#include "scsi/unit.h"

/* cffi: begin */
#define SCSI_CDB_SIZE 32
#define SCSI_SENSE_SIZE 36	/* room for what we write: descriptor format, three descriptors */
#define SCSI_BUFFER_SIZE 131072 /* what a command needs that cannot work on the initiator's memory */
/* cffi: end */

struct scsi_command;
struct sense;

/* What task management has made of a task: it begins nothing more, and completes. */
enum scsi_abort {
	SCSI_NOT_ABORTED,
	SCSI_ABORTED,
	SCSI_ABORTED_BY_RESET,
};

struct scsi_task {
	struct bdev_io io; /* first: the task is found from it */
	struct scsi_target *target;
	struct scsi_unit *unit; /* NULL: there is none at that LUN. Else the task counts as in flight of it */
	const struct scsi_command *command;
	void (*done)(struct scsi_task *task); /* the outcome is valid; the task is over */

	/* Set by the transport. */
	struct iovec *out; /* Data-Out, which the device reads; the arrays may be changed */
	struct iovec *in;  /* Data-In, which it writes */
	uint64_t out_bytes;
	uint64_t in_bytes;
	uint32_t out_count;
	uint32_t in_count;
	uint64_t tag;
	uint8_t cdb[SCSI_CDB_SIZE];
	union {
		uint32_t peculiar; /* 0: a SIMPLE task that none of these is true of, as most that only read */
		struct {
			uint8_t attribute; /* enum scsi_attribute */
			bool again;	   /* taken from the in-flight log of a process that is gone */
			bool well_known;   /* for the REPORT LUNS well-known logical unit */
			bool changes;	   /* counts in fence_begin(): not the transport's to set */
		};
	};

	union {
		uint64_t outcome; /* 0: GOOD, and nothing else to be seen to; one word for most tasks */
		struct {
			uint8_t status; /* enum scsi_status */
			uint8_t sense_length;
			uint8_t aborted;  /* enum scsi_abort */
			bool overrun;	  /* the CDB asks for more data than there are buffers */
			bool buffer_used; /* beyond the first page */
		};
	};
	uint64_t transferred; /* bytes of Data-Out that were wanted, or of Data-In that were written */

	/* For the executors. */
	uint64_t position; /* bytes of the range that are done; of a list, its next entry */
	struct bdev
	    *locked;	 /* the bdev of which it holds a range, or NULL; only what changes the medium does */
	uint64_t length; /* of a list: bytes */
	uint64_t lba;
	uint64_t blocks;
	void (*next)(struct scsi_task *task);	 /* what to do when the bdev is done with the present part */
	void (*failed)(struct scsi_task *task);	 /* what to do when task_submit_to() has failed */
	bool (*is_over)(struct scsi_task *task); /* what wait_until() waits for */
	struct scsi_task *link;			 /* in a queue of its unit */
	uint8_t *buffer; /* the transport's: SCSI_BUFFER_SIZE bytes; not touched by the fast path */
	struct iovec piece;
	struct bdev_lock lock;
	uint8_t sense[SCSI_SENSE_SIZE];
};

/*
 * Begin a task whose first part is filled in, and whose outcome and @transferred are 0; it ends in one call of
 * done(), maybe before this returns.
 */
void scsi_task_start(struct scsi_task *task);

#define RARE __attribute__((cold))

/* --- for executors: each ends the task, or starts the next step of it -------------------------------- */

void task_good(struct scsi_task *task);
RARE void task_status(struct scsi_task *task, enum scsi_status status);
RARE void task_sense(struct scsi_task *task, enum scsi_key key, enum scsi_asc asc);
/* MISCOMPARE or a medium error: with the number in the INFORMATION field. */
RARE void task_sense_information(struct scsi_task *task, enum scsi_key key, enum scsi_asc asc,
				 uint64_t information);
/* NOT READY with a progress indication, of 65536. */
RARE void task_sense_progress(struct scsi_task *task, enum scsi_asc asc, uint16_t progress);
/* INVALID FIELD: @byte of the CDB, and @bit of it or -1 for all of the byte. */
RARE void task_bad_cdb(struct scsi_task *task, unsigned byte, int bit);
/* INVALID FIELD IN PARAMETER LIST. */
RARE void task_bad_list(struct scsi_task *task, unsigned byte, int bit);
/* The same with another additional sense code. */
RARE void task_bad_field(struct scsi_task *task, enum scsi_asc asc, unsigned byte);
/* Any other sense data. */
RARE void task_fail(struct scsi_task *task, const struct sense *sense);
/* What a bdev's errno means to an initiator. */
RARE void task_error(struct scsi_task *task, int error);

/* Answer parameter data, cut to the CDB's allocation length, with status GOOD. */
void task_reply(struct scsi_task *task, const void *data, uint64_t length, uint64_t allocation);
/*
 * Copy the @length bytes of a parameter list to task->buffer. False, and the task has ended, when the
 * initiator provides fewer or the buffer is too small.
 */
bool task_list(struct scsi_task *task, uint64_t length);
/* Copy a part of Data-Out, which must have it. */
void task_copy_out(const struct scsi_task *task, uint64_t offset, void *to, uint64_t length);

/* How many bytes of Data-Out from @offset are as @data has them: @length if all are. */
uint64_t task_compare_out(const struct scsi_task *task, uint64_t offset, const void *data, uint64_t length);

/* Submit all of the work: @done follows, which ends the task. */
void task_submit_all(struct scsi_task *task, enum bdev_op op, uint64_t offset, uint64_t length,
		     void (*done)(struct bdev_io *io, int status));
/* Submit a part of the work; task->next follows when it has succeeded, and the task ends when it has not. */
void task_submit(struct scsi_task *task, enum bdev_op op, uint64_t offset, uint64_t length,
		 void (*next)(struct scsi_task *task));
/* The same for READ and WRITE of memory of ours, task->buffer as a rule. */
void task_submit_buffer(struct scsi_task *task, enum bdev_op op, uint64_t offset, void *data, uint64_t length,
			void (*next)(struct scsi_task *task));

/* The same of any unit; task->failed follows when it does not succeed. */
void task_submit_to(struct scsi_task *task, struct scsi_unit *unit, enum bdev_op op, uint64_t offset,
		    void *data, uint64_t length, void (*next)(struct scsi_task *task));

/* Is [lba, lba + blocks) on the medium? If not the task has ended. */
bool task_check_range(struct scsi_task *task, uint64_t lba, uint64_t blocks);
/* The same for a command of which page B0h tells MAXIMUM TRANSFER LENGTH: and is it no longer than that? */
bool task_check_transfer(struct scsi_task *task, uint64_t lba, uint32_t blocks);
/* May this nexus change the medium? If not the task has ended. */
bool task_check_writable(struct scsi_task *task);

#endif
