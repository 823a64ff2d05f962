/*
 * The control queue of a virtio-scsi device (virtio 1.2, section 5.6.6.2).
 *
 * A task management function cannot take back what a bdev is working on. It marks the tasks that it is for,
 * so that they begin nothing more, and completes when all of them have ended: here, and wherever else there
 * are some, which Python sees to.
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

enum control_type {
	CONTROL_TASK_MANAGEMENT,
	CONTROL_NOTIFICATION_QUERY,
	CONTROL_NOTIFICATION_SUBSCRIBE,
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
	struct scsi_management what;
	bool asking; /* others have not answered yet */
	bool query;
	bool found;
	struct control_request *next; /* of those that wait */
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

static struct control_request *control_at(const struct queue *queue, uint32_t slot)
{
	return (struct control_request *)(queue->requests + slot * sizeof(struct control_request));
}

static void respond(struct control_request *request, enum scsi_response code)
{
	uint8_t byte = (uint8_t)code;

	queue_answer(&request->base, &byte, 1);
}

/* --- waiting for others' answers, and for tasks of ours to end --- */

static bool is_over(const struct control_request *request)
{
	if (request->asking) {
		return false;
	}
	return request->query || !scsi_device_waits(control_of(request)->device, &request->what);
}

static void wait_more(struct control_queue *queue)
{
	struct reactor *reactor = queue->base.reactor;
	uint64_t due = reactor_now(reactor) + reactor_ns_to_ticks(RECHECK_NS);

	if (timer_set(reactor, &queue->timer, due) == 0) {
		return;
	}
	/* Without memory for a timer nobody could ever look again; the others are looked at when asked. */
	for (struct control_request **link = &queue->waiting; *link != NULL;) {
		struct control_request *request = *link;

		if (request->asking) {
			link = &request->next;
		} else {
			*link = request->next;
			respond(request, RESPONSE_FAILURE);
		}
	}
}

static void look_again(struct control_queue *queue)
{
	struct control_request **link = &queue->waiting;
	bool tasks = false;

	while (*link != NULL) {
		struct control_request *request = *link;

		if (is_over(request)) {
			*link = request->next;
			respond(request, request->found ? RESPONSE_SUCCEEDED : RESPONSE_OK);
		} else {
			tasks |= !request->asking;
			link = &request->next;
		}
	}
	if (tasks) {
		wait_more(queue);
	}
}

static void timed(struct timer *timer)
{
	look_again((struct control_queue *)((char *)timer - offsetof(struct control_queue, timer)));
}

void scsi_control_asked(const struct queue *queue, uint32_t slot, struct scsi_management *what)
{
	*what = control_at(queue, slot)->what;
}

void scsi_control_answer(struct queue *base, uint32_t slot, int found)
{
	struct control_queue *queue = (struct control_queue *)base;
	struct control_request *request = control_at(base, slot);

	request->asking = false;
	request->found = request->query && found > 0;
	if (found < 0) {
		struct control_request **link = &queue->waiting;

		while (*link != request) {
			link = &(*link)->next;
		}
		*link = request->next;
		respond(request, RESPONSE_FAILURE);
	}
	look_again(queue);
}

/* --- functions --- */

static void ask_others(struct control_request *request)
{
	struct control_queue *queue = control_of(request);

	request->asking = true;
	request->found = false;
	request->next = queue->waiting;
	queue->waiting = request;
	scsi_ask(&request->base);
}

static void abort_tasks(struct control_request *request)
{
	scsi_device_abort(control_of(request)->device, &request->what);
	ask_others(request);
}

static void query(struct control_request *request)
{
	request->query = true;
	if (scsi_device_count(control_of(request)->device, &request->what) > 0) {
		respond(request, RESPONSE_SUCCEEDED);
	} else {
		ask_others(request);
	}
}

static void carry_out(struct control_request *request, struct scsi_target *target, struct scsi_unit *unit)
{
	switch (request->what.function) {
	case SCSI_ABORT_TASK:
	case SCSI_ABORT_TASK_SET:
	case SCSI_CLEAR_TASK_SET: /* the same: every nexus has a task set of its own (TST) */
		abort_tasks(request);
		break;
	case SCSI_CLEAR_ACA: /* aborts commands with the attribute (SAM-6 section 7.4) */
		scsi_target_clear_aca(target, request->what.lun);
		abort_tasks(request);
		break;
	case SCSI_NEXUS_RESET:
		scsi_target_nexus_reset(target);
		abort_tasks(request);
		break;
	case SCSI_UNIT_RESET:
		scsi_shared_reset(unit->shared);
		abort_tasks(request);
		break;
	case SCSI_QUERY_TASK:
	case SCSI_QUERY_TASK_SET:
		query(request);
		break;
	default:
		respond(request, RESPONSE_REJECTED);
	}
}

static void manage(struct control_request *request)
{
	struct scsi_device *device = control_of(request)->device;
	struct scsi_management *what = &request->what;
	struct scsi_target *target;
	struct scsi_address address;
	struct scsi_unit *unit;

	*what = (struct scsi_management){.function = request->ask.function, .tag = request->ask.tag};
	request->query = false;
	if (!scsi_parse_lun(request->ask.lun, &address)) {
		respond(request, RESPONSE_INCORRECT_LUN);
		return;
	}
	what->target = address.target;
	what->lun = address.lun;
	target = device->targets[what->target];
	if (target == NULL) {
		respond(request, RESPONSE_BAD_TARGET);
		return;
	}
	unit = what->lun < SCSI_MAX_UNITS ? target->units[what->lun] : NULL;
	if (unit == NULL && what->function != SCSI_NEXUS_RESET) {
		respond(request, RESPONSE_INCORRECT_LUN);
		return;
	}
	what->serial = scsi_device_serial(device);
	carry_out(request, target, unit);
}

/* No logical unit has anything to notify of (SPC has it for removable media). */
static void notification(struct control_request *request)
{
	uint8_t answer[5] = {0};

	queue_answer(&request->base, answer, sizeof(answer));
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
	queue->timer.fire = timed;
	rc = queue_start(&queue->base, &control_ops, reactor, memory, vq, slot);
	if (rc < 0) {
		free(queue);
		errno = -rc;
		return NULL;
	}
	return &queue->base;
}
