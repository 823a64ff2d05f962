/*
 * The event queue of a virtio-scsi device (virtio 1.2, section 5.6.6.3): buffers are taken only when there is
 * something to tell, so that nothing is in flight there for long.
 */
#include <errno.h>
#include <stdlib.h>

#include "vhost/scsi.h"

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
	queue_answer(base, &record, sizeof(record));
}

static void submit_nothing(struct queue *queue)
{
	/* Every request was dealt with when it began. */
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

static void wake(struct scsi_device *device)
{
	if (device->events != NULL && !device->events->stopping) {
		poller_wake(&device->events->poller);
	}
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
	wake(device);
}

void scsi_device_missed(struct scsi_device *device)
{
	device->missed = true;
	wake(device);
}
