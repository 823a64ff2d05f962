/*
 * A virtio-scsi device (virtio 1.2, section 5.6) as one reactor serves it to one front-end: the targets, and
 * the queues that share them. Queue 0 takes task management, queue 1 gives events, the others commands.
 */
#ifndef VHOST_SCSI_H
#define VHOST_SCSI_H

#include "scsi/task.h"
#include "vhost/queue.h"

/* cffi: begin */
#define SCSI_MAX_TARGETS 256
#define SCSI_CONTROL_QUEUE 0
#define SCSI_EVENT_QUEUE 1

/* Event types and reasons, virtio 1.2, section 5.6.6.3. */
enum scsi_event {
	SCSI_NO_EVENT,
	SCSI_TRANSPORT_RESET,
	SCSI_ASYNC_NOTIFY,
	SCSI_PARAM_CHANGE,
};

#define SCSI_RESET_RESCAN 1
#define SCSI_RESET_REMOVED 2

struct scsi_device;

struct scsi_device *scsi_device_create(struct reactor *reactor);
/* No queue uses it any more, and no task of its targets is in flight; frees the targets as well. */
void scsi_device_free(struct scsi_device *device);
/* The target with a number: NULL when there is none. */
struct scsi_target *scsi_device_target(struct scsi_device *device, uint32_t number);
/* Have a target; @target belongs to the device from now on. 0, -EINVAL, -EEXIST. */
int scsi_device_add(struct scsi_device *device, uint32_t number, struct scsi_target *target);
/* Free a target that has no tasks in flight: 0, -ENOENT, -EBUSY. */
int scsi_device_remove(struct scsi_device *device, uint32_t number);
/* Tell the driver, as soon as it provides a buffer; when too many wait it learns that it missed some. */
void scsi_device_event(struct scsi_device *device, enum scsi_event event, uint32_t target, uint32_t lun,
		       uint32_t reason);

/* Events were lost that this device has never heard of: the driver is told so. */
void scsi_device_missed(struct scsi_device *device);

/* Task management functions, section 5.6.6.2. */
enum scsi_function {
	SCSI_ABORT_TASK,
	SCSI_ABORT_TASK_SET,
	SCSI_CLEAR_ACA,
	SCSI_CLEAR_TASK_SET,
	SCSI_NEXUS_RESET,
	SCSI_UNIT_RESET,
	SCSI_QUERY_TASK,
	SCSI_QUERY_TASK_SET,
	SCSI_PREEMPT, /* not the driver's: PERSISTENT RESERVE OUT aborts what others have sent */
};

/* Which tasks of a device a function is for: those of @target, @lun and @tag, as far as they matter to it. */
struct scsi_management {
	uint32_t function;
	uint32_t target;
	uint32_t lun;
	uint32_t serial; /* those that began before the device had this serial number */
	uint64_t tag;
	uint64_t nexuses[4]; /* SCSI_PREEMPT: whose tasks, at this unit; 1 << nexus */
};

/* Number a function, which is for what has begun before. */
uint32_t scsi_device_serial(struct scsi_device *device);
/* How many tasks in flight it is for. */
uint32_t scsi_device_count(const struct scsi_device *device, const struct scsi_management *what);
/* Have them begin nothing more. */
void scsi_device_abort(struct scsi_device *device, const struct scsi_management *what);
/* Is one of them in flight, or may one be that another process has left? */
bool scsi_device_waits(const struct scsi_device *device, const struct scsi_management *what);

/* After NOTICE_ASK: what the request in @slot asks other devices and reactors to do, */
void scsi_queue_asked(struct queue *queue, uint32_t slot, struct scsi_management *what);
/* and what they have answered: how many tasks of theirs there were, or -errno. */
void scsi_queue_answer(struct queue *queue, uint32_t slot, int found);

/* Serve queue @index of the device. NULL and errno on failure, with a notice that says why. */
struct queue *scsi_queue_start(struct reactor *reactor, struct guest_memory *memory, struct scsi_device *device,
			       uint32_t index, const struct vq_setup *vq, uint32_t slot);
/* cffi: end */

/* Response codes, section 5.6.6.1 and 5.6.6.2. */
enum scsi_response {
	RESPONSE_OK = 0, /* and FUNCTION COMPLETE */
	RESPONSE_OVERRUN = 1,
	RESPONSE_ABORTED = 2,
	RESPONSE_BAD_TARGET = 3,
	RESPONSE_RESET = 4,
	RESPONSE_FAILURE = 9,
	RESPONSE_SUCCEEDED = 10,
	RESPONSE_REJECTED = 11,
	RESPONSE_INCORRECT_LUN = 12,
};

#define SCSI_EVENT_BACKLOG 64
#define WELL_KNOWN_LUN SCSI_MAX_UNITS

struct scsi_event_record {
	uint32_t event;
	uint8_t lun[8];
	uint32_t reason;
};

struct scsi_device {
	struct reactor *reactor;
	struct scsi_target *targets[SCSI_MAX_TARGETS];
	struct request_queue *queues;
	uint32_t serial;      /* of the last task management function */
	struct queue *events; /* the event queue, while it is served */
	struct scsi_event_record backlog[SCSI_EVENT_BACKLOG];
	uint32_t backlog_first;
	uint32_t backlog_count;
	bool missed;
};

struct scsi_command_header {
	uint8_t lun[8];
	uint64_t tag;
	uint8_t attribute;
	uint8_t priority;
	uint8_t crn;
	uint8_t cdb[SCSI_CDB_SIZE];
} __attribute__((packed));

struct scsi_command_response {
	uint32_t sense_length;
	uint32_t residual;
	uint16_t qualifier;
	uint8_t status;
	uint8_t response;
	uint8_t sense[96];
};

_Static_assert(sizeof(struct scsi_command_header) == 51, "virtio 5.6.6.1, cdb_size 32");
_Static_assert(sizeof(struct scsi_command_response) == 108, "virtio 5.6.6.1, sense_size 96");
_Static_assert(sizeof(struct scsi_event_record) == 16, "virtio 5.6.6.3");

/* What a driver's LUN field names. */
struct scsi_address {
	uint32_t target;
	uint32_t lun;
};

struct scsi_request {
	struct queue_request base;
	uint8_t *response; /* where it goes; NULL: to the pieces in struct scsi_extra */
	uint32_t serial;   /* the device's when it began */
	struct scsi_address address;
	struct scsi_task task;
};

struct request_queue {
	struct queue base;
	struct scsi_device *device;
	struct request_queue *next;
	uint64_t lun; /* the last LUN field that there was, and what it names */
	struct scsi_address address;
	struct scsi_request *ready[QUEUE_BATCH]; /* of this batch, to be started together */
	uint32_t ready_count;
};

/* Which target and logical unit an address names (section 5.6.6.1); false: it has another form. */
bool scsi_parse_lun(const uint8_t *lun, struct scsi_address *address);

static inline struct scsi_request *scsi_request_at(const struct request_queue *queue, uint32_t slot)
{
	return (struct scsi_request *)(queue->base.requests + slot * sizeof(struct scsi_request));
}

/* The other two queues: scsi_control.c and scsi_events.c. */
struct queue *scsi_control_start(struct reactor *reactor, struct guest_memory *memory,
				 struct scsi_device *device, const struct vq_setup *vq, uint32_t slot);
struct queue *scsi_events_start(struct reactor *reactor, struct guest_memory *memory,
				struct scsi_device *device, const struct vq_setup *vq, uint32_t slot);

/* Ask Python to have a function carried out by others, see scsi_queue_asked(). */
void scsi_ask(struct queue_request *request);
void scsi_abort_others(struct scsi_task *task); /* PREEMPT AND ABORT: see struct scsi_target */
void scsi_control_asked(const struct queue *queue, uint32_t slot, struct scsi_management *what);
void scsi_control_answer(struct queue *queue, uint32_t slot, int found);

#endif
