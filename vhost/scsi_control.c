/*
 * The control and event queues of a virtio-scsi device.
 *
 * A task management function cannot take back what a bdev is working on. It marks the tasks that it is for,
 * so that they begin nothing more, and completes when all of them have ended: a task belongs to it if it
 * began before, which the device's serial number tells.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "vhost/ring.h"
#include "vhost/scsi.h"

#define RECHECK_NS 50000

static void submit_nothing(struct queue *queue)
{
	/* Every request was dealt with when it began. */
}

/* --- the control queue, section 5.6.6.2 --------------------------------------------------------------- */

enum control_type {
	CONTROL_TASK_MANAGEMENT,
	CONTROL_NOTIFICATION_QUERY,
	CONTROL_NOTIFICATION_SUBSCRIBE,
};

enum function {
	ABORT_TASK,
	ABORT_TASK_SET,
	CLEAR_ACA,
	CLEAR_TASK_SET,
	NEXUS_RESET,
	UNIT_RESET,
	QUERY_TASK,
	QUERY_TASK_SET,
};

struct task_management {
	uint32_t type;
	uint32_t function;
	uint8_t lun[8];
	uint64_t tag;
};

struct notification {
	uint32_t type;
	uint8_t lun[8];
	uint32_t events;
} __attribute__((packed));

_Static_assert(sizeof(struct task_management) == 24, "virtio 5.6.6.2");
_Static_assert(sizeof(struct notification) == 16, "virtio 5.6.6.2");

struct control_request {
	struct queue_request base;
	struct task_management ask;
	uint32_t target;
	uint32_t lun;
	uint32_t serial;
	struct control_request *next; /* of those that wait for tasks to end */
};

struct control_queue {
	struct queue base;
	struct scsi_device *device;
	struct control_request *waiting;
	struct timer timer;
};

static struct control_queue *control_of(const struct control_request *request)
{
	return (struct control_queue *)request->base.queue;
}

static void respond(struct control_request *request, enum scsi_response code)
{
	uint8_t byte = (uint8_t)code;

	queue_complete(&request->base, (uint32_t)chain_put(&request->base.chain, &byte, 1), 0);
}

/* Is it one of the tasks that the function is for? */
static bool is_meant(const struct control_request *asked, const struct scsi_request *request)
{
	if (!request->active || request->target != asked->target ||
	    (int32_t)(request->serial - asked->serial) >= 0) {
		return false;
	}
	switch (asked->ask.function) {
	case ABORT_TASK:
	case QUERY_TASK:
		return request->lun == asked->lun && request->task.tag == asked->ask.tag;
	case NEXUS_RESET:
		return true;
	default:
		return request->lun == asked->lun;
	}
}

/* Count the tasks that the function is for; mark them unless @verdict is RESPONSE_OK. */
static uint32_t visit(const struct control_request *asked, enum scsi_response verdict)
{
	uint32_t count = 0;

	for (struct request_queue *queue = control_of(asked)->device->queues; queue; queue = queue->next) {
		for (uint32_t slot = 0; slot < queue->base.vq.size; slot++) {
			struct scsi_request *request = scsi_request_at(queue, slot);

			if (!is_meant(asked, request)) {
				continue;
			}
			count++;
			if (verdict != RESPONSE_OK) {
				request->task.aborted = true;
				request->verdict = (uint8_t)verdict;
			}
		}
	}
	return count;
}

static void wait_more(struct control_queue *queue)
{
	struct reactor *reactor = queue->base.reactor;
	uint64_t due = reactor_now(reactor) + reactor_ns_to_ticks(RECHECK_NS);

	if (timer_set(reactor, &queue->timer, due) == 0) {
		return;
	}
	while (queue->waiting != NULL) { /* without memory for a timer nobody could ever look again */
		struct control_request *request = queue->waiting;

		queue->waiting = request->next;
		respond(request, RESPONSE_FAILURE);
	}
}

static void look_again(struct timer *timer)
{
	struct control_queue *queue =
	    (struct control_queue *)((char *)timer - offsetof(struct control_queue, timer));
	struct control_request **link = &queue->waiting;

	while (*link != NULL) {
		struct control_request *request = *link;

		if (visit(request, RESPONSE_OK) == 0) {
			*link = request->next;
			respond(request, RESPONSE_OK);
		} else {
			link = &request->next;
		}
	}
	if (queue->waiting != NULL) {
		wait_more(queue);
	}
}

static void abort_tasks(struct control_request *request, enum scsi_response verdict)
{
	struct control_queue *queue = control_of(request);

	if (visit(request, verdict) == 0) {
		respond(request, RESPONSE_OK);
		return;
	}
	request->next = queue->waiting;
	queue->waiting = request;
	wait_more(queue);
}

static void manage(struct control_request *request)
{
	struct scsi_device *device = control_of(request)->device;
	struct scsi_target *target;
	struct scsi_unit *unit;

	if (!scsi_parse_lun(request->ask.lun, &request->target, &request->lun)) {
		respond(request, RESPONSE_INCORRECT_LUN);
		return;
	}
	target = device->targets[request->target];
	if (target == NULL) {
		respond(request, RESPONSE_BAD_TARGET);
		return;
	}
	unit = request->lun < SCSI_MAX_UNITS ? target->units[request->lun] : NULL;
	if (unit == NULL && request->ask.function != NEXUS_RESET) {
		respond(request, RESPONSE_INCORRECT_LUN);
		return;
	}
	request->serial = ++device->serial;
	switch (request->ask.function) {
	case ABORT_TASK:
	case ABORT_TASK_SET:
	case CLEAR_TASK_SET: /* the same: every nexus has a task set of its own (TST) */
		abort_tasks(request, RESPONSE_ABORTED);
		break;
	case CLEAR_ACA: /* there never is one */
		respond(request, RESPONSE_OK);
		break;
	case NEXUS_RESET:
		scsi_target_attention(target, -1, SCSI_ATTENTION_NEXUS_LOSS);
		abort_tasks(request, RESPONSE_RESET);
		break;
	case UNIT_RESET:
		scsi_shared_reset(unit->shared);
		abort_tasks(request, RESPONSE_RESET);
		break;
	case QUERY_TASK:
	case QUERY_TASK_SET:
		respond(request, visit(request, RESPONSE_OK) > 0 ? RESPONSE_SUCCEEDED : RESPONSE_OK);
		break;
	default:
		respond(request, RESPONSE_REJECTED);
	}
}

/* No logical unit has anything to notify of (SPC has it for removable media). */
static void notification(struct control_request *request)
{
	uint8_t answer[5] = {0};

	queue_complete(&request->base, (uint32_t)chain_put(&request->base.chain, answer, sizeof(answer)), 0);
}

static void start_control(struct queue_request *base)
{
	struct control_request *request = (struct control_request *)base;
	struct vq_chain *chain = &base->chain;
	uint64_t size = chain->readable_bytes;

	memset(&request->ask, 0, sizeof(request->ask));
	if (size > sizeof(request->ask)) {
		size = sizeof(request->ask);
	}
	chain_take(chain, &request->ask, size);
	if (request->ask.type == CONTROL_TASK_MANAGEMENT && size == sizeof(request->ask)) {
		manage(request);
	} else if ((request->ask.type == CONTROL_NOTIFICATION_QUERY ||
		    request->ask.type == CONTROL_NOTIFICATION_SUBSCRIBE) &&
		   size >= sizeof(struct notification)) {
		notification(request);
	} else {
		respond(request, RESPONSE_FAILURE);
	}
}

static void free_control(struct queue *base)
{
	struct control_queue *queue = (struct control_queue *)base;

	timer_clear(base->reactor, &queue->timer);
	free(queue);
}

static const struct queue_ops control_ops = {
    .request_size = sizeof(struct control_request),
    .extra_size = sizeof(struct queue_request_extra),
    .start = start_control,
    .submit = submit_nothing,
    .free = free_control,
};

struct queue *scsi_control_start(struct reactor *reactor, struct guest_memory *memory,
				 struct scsi_device *device, const struct vq_setup *vq, uint32_t slot)
{
	struct control_queue *queue = calloc(1, sizeof(*queue));
	int rc;

	if (queue == NULL) {
		errno = ENOMEM;
		return NULL;
	}
	queue->device = device;
	queue->timer.fire = look_again;
	rc = queue_start(&queue->base, &control_ops, reactor, memory, vq, slot);
	if (rc < 0) {
		free(queue);
		errno = -rc;
		return NULL;
	}
	return &queue->base;
}

/* --- the event queue, section 5.6.6.3: buffers are taken only when there is something to tell --------- */

#define EVENTS_MISSED 0x80000000u

struct event_queue {
	struct queue base;
	struct scsi_device *device;
};

static uint32_t events_wanted(const struct queue *base)
{
	const struct scsi_device *device = ((const struct event_queue *)base)->device;

	return device->backlog_count > 0 ? device->backlog_count : device->missed;
}

static void start_event(struct queue_request *base)
{
	struct scsi_device *device = ((struct event_queue *)base->queue)->device;
	struct scsi_event_record record = {.event = SCSI_NO_EVENT};

	if (base->chain.writable_bytes < sizeof(record)) {
		queue_complete(base, 0, 0); /* of no use; the event waits for another */
		return;
	}
	if (device->backlog_count > 0) {
		record = device->backlog[device->backlog_first];
		device->backlog_first = (device->backlog_first + 1) % SCSI_EVENT_BACKLOG;
		device->backlog_count--;
	}
	if (device->missed) {
		record.event |= EVENTS_MISSED;
		device->missed = false;
	}
	queue_complete(base, (uint32_t)chain_put(&base->chain, &record, sizeof(record)), 0);
}

static void free_events(struct queue *base)
{
	struct event_queue *queue = (struct event_queue *)base;

	queue->device->events = NULL;
	free(queue);
}

static const struct queue_ops event_ops = {
    .request_size = sizeof(struct queue_request),
    .extra_size = sizeof(struct queue_request_extra),
    .start = start_event,
    .submit = submit_nothing,
    .free = free_events,
    .wanted = events_wanted,
};

struct queue *scsi_events_start(struct reactor *reactor, struct guest_memory *memory,
				struct scsi_device *device, const struct vq_setup *vq, uint32_t slot)
{
	struct event_queue *queue = calloc(1, sizeof(*queue));
	int rc;

	if (queue == NULL) {
		errno = ENOMEM;
		return NULL;
	}
	queue->device = device;
	rc = queue_start(&queue->base, &event_ops, reactor, memory, vq, slot);
	if (rc < 0) {
		free(queue);
		errno = -rc;
		return NULL;
	}
	device->events = &queue->base;
	return &queue->base;
}

void scsi_device_event(struct scsi_device *device, enum scsi_event event, uint32_t target, uint32_t lun,
		       uint32_t reason)
{
	if (device->backlog_count == SCSI_EVENT_BACKLOG) {
		device->missed = true;
	} else {
		uint32_t place = (device->backlog_first + device->backlog_count++) % SCSI_EVENT_BACKLOG;

		/* A LUN as REPORT LUNS has it. */
		device->backlog[place] = (struct scsi_event_record){
		    .event = event,
		    .lun = {1, (uint8_t)target, 0, (uint8_t)lun},
		    .reason = reason,
		};
	}
	if (device->events != NULL && !device->events->stopping) {
		poller_wake(&device->events->poller);
	}
}
