/* A virtio-scsi device: its targets, and what task management makes of their tasks. */
#include <errno.h>
#include <stdlib.h>

#include "vhost/ring.h"
#include "vhost/scsi.h"

/* --- targets ---------------------------------------------------------------------------------------- */

struct scsi_device *scsi_device_create(struct reactor *reactor)
{
	struct scsi_device *device = calloc(1, sizeof(*device));

	if (device != NULL) {
		device->reactor = reactor;
	}
	return device;
}

void scsi_device_free(struct scsi_device *device)
{
	for (unsigned i = 0; i < SCSI_MAX_TARGETS; i++) {
		if (device->targets[i] != NULL) {
			scsi_target_free(device->targets[i]);
		}
	}
	free(device);
}

struct scsi_target *scsi_device_target(struct scsi_device *device, uint32_t number)
{
	return number < SCSI_MAX_TARGETS ? device->targets[number] : NULL;
}

int scsi_device_add(struct scsi_device *device, uint32_t number, struct scsi_target *target)
{
	if (number >= SCSI_MAX_TARGETS) {
		return -EINVAL;
	}
	if (device->targets[number] != NULL) {
		return -EEXIST;
	}
	device->targets[number] = target;
	target->abort_others = scsi_abort_others;
	target->peers = device->targets;
	target->peer_count = SCSI_MAX_TARGETS;
	return 0;
}

int scsi_device_remove(struct scsi_device *device, uint32_t number)
{
	struct scsi_target *target = scsi_device_target(device, number);

	if (target == NULL) {
		return -ENOENT;
	}
	if (scsi_target_in_flight(target) > 0) {
		return -EBUSY;
	}
	device->targets[number] = NULL;
	scsi_target_free(target);
	return 0;
}

/*
 * --- task management: which tasks a function is for, and what becomes of them. A task belongs to it if it
 * began before, which the device's serial number tells. ---
 */

uint32_t scsi_device_serial(struct scsi_device *device)
{
	return ++device->serial;
}

static bool is_meant(const struct scsi_management *what, const struct scsi_request *request)
{
	if (request->base.memory == NULL || request->address.target != what->target ||
	    (int32_t)(request->serial - what->serial) >= 0) {
		return false;
	}
	switch (what->function) {
	case SCSI_ABORT_TASK:
	case SCSI_QUERY_TASK:
		return request->address.lun == what->lun && request->task.tag == what->tag;
	case SCSI_CLEAR_ACA:
		return request->address.lun == what->lun && request->task.attribute == SCSI_ACA;
	case SCSI_NEXUS_RESET:
		return true;
	default:
		return request->address.lun == what->lun;
	}
}

uint32_t scsi_device_count(const struct scsi_device *device, const struct scsi_management *what)
{
	uint32_t count = 0;

	for (const struct request_queue *queue = device->queues; queue; queue = queue->next) {
		for (uint32_t slot = 0; slot < queue->base.vq.size; slot++) {
			count += is_meant(what, scsi_request_at(queue, slot));
		}
	}
	return count;
}

void scsi_device_abort(struct scsi_device *device, const struct scsi_management *what)
{
	bool reset = what->function == SCSI_NEXUS_RESET || what->function == SCSI_UNIT_RESET;

	for (struct request_queue *queue = device->queues; queue; queue = queue->next) {
		for (uint32_t slot = 0; slot < queue->base.vq.size; slot++) {
			struct scsi_request *request = scsi_request_at(queue, slot);

			if (is_meant(what, request)) {
				request->task.aborted = reset ? SCSI_ABORTED_BY_RESET : SCSI_ABORTED;
			}
		}
	}
}

bool scsi_device_waits(const struct scsi_device *device, const struct scsi_management *what)
{
	for (struct request_queue *queue = device->queues; queue; queue = queue->next) {
		if (vq_has_resubmits(&queue->base.vq)) {
			return true;
		}
	}
	return scsi_device_count(device, what) > 0;
}

void scsi_ask(struct queue_request *request)
{
	struct queue *queue = request->queue;

	reactor_notify(queue->reactor, queue->vq.id, NOTICE_ASK, request->slot, "ask");
}
