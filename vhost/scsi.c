/*
 * Commands: start() copies a request's header out of guest memory and makes a task of it, whose buffers are
 * the guest's own; finished() writes the response in front of them.
 */
#include "vhost/scsi.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "vhost/ring.h"

#define RESPONSE_SIZE sizeof(struct scsi_command_response)
#define RESPONSE_HEAD offsetof(struct scsi_command_response, sense)
#define KEPT_BUFFER 4096 /* of a request's buffer: what is beyond goes back to the system after use */

struct scsi_extra {
	struct queue_request_extra base;
	struct iovec response[RESPONSE_SIZE]; /* a driver may cut it to bytes */
	uint8_t buffer[SCSI_BUFFER_SIZE] __attribute__((aligned(4096)));
};

_Static_assert(sizeof(struct scsi_extra) % 4096 == 0, "buffers are whole pages");

bool scsi_parse_lun(const uint8_t *lun, uint32_t *target, uint32_t *number)
{
	static const uint8_t zero[4];

	if (lun[0] != 1 || memcmp(lun + 4, zero, sizeof(zero)) != 0) {
		return false;
	}
	*target = lun[1];
	if (lun[2] == 0xc1 && lun[3] == 0x01) {
		*number = WELL_KNOWN_LUN;
		return true;
	}
	/* Flat space or peripheral device addressing. What we do not have, 256 and more, is no unit. */
	*number = (uint32_t)(lun[2] & 0x3f) << 8 | lun[3];
	if (*number >= SCSI_MAX_UNITS) {
		*number = SCSI_MAX_UNITS + 1;
	}
	return lun[2] == 0 || (lun[2] & 0xc0) == 0x40;
}

/* --- ending ----------------------------------------------------------------------------------------- */

static void put_response(const struct scsi_request *request, const struct scsi_command_response *response,
			 size_t size)
{
	const struct iovec *iov = request->response;

	if (likely(request->response_count == 1)) {
		memcpy(iov->iov_base, response, size);
		return;
	}
	for (size_t done = 0; done < size; iov++) {
		size_t part = iov->iov_len < size - done ? iov->iov_len : size - done;

		memcpy(iov->iov_base, (const uint8_t *)response + done, part);
		done += part;
	}
}

/* End a request that never became a task, or that has been one. */
static void finish(struct scsi_request *request, enum scsi_response code)
{
	const struct scsi_task *task = &request->task;
	uint64_t expected = task->in_bytes != 0 ? task->in_bytes : task->out_bytes;
	uint64_t moved = task->transferred;
	struct scsi_command_response response;

	/* Memory of the driver that is not data is not written beyond the sense data. */
	response.sense_length = task->sense_length;
	response.residual = code == RESPONSE_OVERRUN || moved > expected ? 0 : (uint32_t)(expected - moved);
	response.qualifier = 0;
	response.status = task->status;
	response.response = (uint8_t)code;
	if (unlikely(task->sense_length > 0)) {
		memcpy(response.sense, task->sense, task->sense_length);
	}
	put_response(request, &response, RESPONSE_HEAD + task->sense_length);
	request->active = false;
	queue_complete(&request->base, (uint32_t)(RESPONSE_SIZE + (task->in_bytes != 0 ? moved : 0)), moved);
}

static void finished(struct scsi_task *task)
{
	struct scsi_request *request =
	    (struct scsi_request *)((char *)task - offsetof(struct scsi_request, task));

	if (unlikely(task->buffer_used)) {
		madvise(task->buffer + KEPT_BUFFER, SCSI_BUFFER_SIZE - KEPT_BUFFER, MADV_DONTNEED);
	}
	if (unlikely(request->verdict != RESPONSE_OK)) {
		finish(request, request->verdict);
	} else {
		finish(request, unlikely(task->overrun) ? RESPONSE_OVERRUN : RESPONSE_OK);
	}
}

/* --- framing: header first, then Data-Out; response first, then Data-In ------------------------------- */

static bool take_header(struct vq_chain *chain, struct scsi_command_header *header)
{
	if (unlikely(chain->readable_bytes < sizeof(*header))) {
		return false;
	}
	/* The writable part stays where it is, and follows the readable one. */
	if (likely(chain->iov->iov_len == sizeof(*header))) {
		memcpy(header, chain->iov->iov_base, sizeof(*header));
		chain->iov++;
		chain->readable--;
		chain->readable_bytes -= sizeof(*header);
	} else {
		chain_take(chain, header, sizeof(*header));
	}
	return true;
}

/* Take the response's place out of the front of Data-In, which has as many bytes. */
static void take_response(struct scsi_request *request)
{
	struct scsi_task *task = &request->task;
	size_t left = RESPONSE_SIZE;

	request->response = &request->response_iov;
	request->response_count = 0;
	if (unlikely(task->in->iov_len < RESPONSE_SIZE)) {
		request->response = ((struct scsi_extra *)queue_request_extra(&request->base))->response;
	}
	task->in_bytes -= RESPONSE_SIZE;
	while (left > 0) {
		struct iovec *first = task->in;
		size_t part = first->iov_len < left ? first->iov_len : left;

		if (part > 0) {
			request->response[request->response_count++] =
			    (struct iovec){.iov_base = first->iov_base, .iov_len = part};
		}
		first->iov_base = (char *)first->iov_base + part;
		first->iov_len -= part;
		left -= part;
		if (first->iov_len == 0) {
			task->in++;
			task->in_count--;
		}
	}
}

/* --- starting --------------------------------------------------------------------------------------- */

static struct request_queue *queue_of(const struct scsi_request *request)
{
	return (struct request_queue *)request->base.queue;
}

#define READ_10 0x28

/* A hint, of what most requests are: a READ that is wrong is found out later. */
static void prefetch(const struct scsi_task *task)
{
	const struct bdev *bdev = task->unit != NULL ? task->unit->bdev : NULL;

	if (bdev != NULL && task->cdb[0] == READ_10) {
		bdev_prefetch(bdev, (uint64_t)get_be32(task->cdb + 2) * bdev->block_size);
	}
}

static void prepare_task(struct scsi_request *request, const struct scsi_command_header *header)
{
	struct request_queue *queue = queue_of(request);
	struct scsi_device *device = queue->device;
	struct scsi_task *task = &request->task;

	if (unlikely(!scsi_parse_lun(header->lun, &request->target, &request->lun)) ||
	    unlikely(device->targets[request->target] == NULL)) {
		finish(request, RESPONSE_BAD_TARGET);
		return;
	}
	task->target = device->targets[request->target];
	task->unit = likely(request->lun < SCSI_MAX_UNITS) ? task->target->units[request->lun] : NULL;
	task->well_known = request->lun == WELL_KNOWN_LUN;
	task->done = finished;
	memcpy(task->cdb, header->cdb, sizeof(task->cdb));
	task->attribute = header->attribute & 7;
	task->tag = header->tag;
	task->again = request->base.again;
	task->aborted = false;
	task->buffer = ((struct scsi_extra *)queue_request_extra(&request->base))->buffer;
	prefetch(task);
	queue->ready[queue->ready_count++] = request;
}

static void submit(struct queue *base)
{
	struct request_queue *queue = (struct request_queue *)base;

	for (uint32_t i = 0; i < queue->ready_count; i++) {
		scsi_task_start(&queue->ready[i]->task);
	}
	queue->ready_count = 0;
}

static void start(struct queue_request *base)
{
	struct scsi_request *request = (struct scsi_request *)base;
	struct vq_chain *chain = &base->chain;
	struct scsi_task *task = &request->task;
	struct scsi_command_header header;

	task->status = 0;
	task->sense_length = 0;
	task->transferred = 0;
	request->verdict = RESPONSE_OK;
	/* Without room for a response, all that the driver can be told is that the request is over. */
	if (unlikely(chain->writable_bytes < RESPONSE_SIZE || chain->writable_bytes > UINT32_MAX)) {
		queue_complete(base, 0, 0);
		return;
	}
	request->active = true;
	request->serial = queue_of(request)->device->serial;
	if (unlikely(!take_header(chain, &header))) {
		task->in = chain_writable(chain);
		task->in_count = chain->writable;
		task->in_bytes = chain->writable_bytes;
		task->out_bytes = 0;
		take_response(request);
		finish(request, RESPONSE_FAILURE);
		return;
	}
	task->out = chain->iov;
	task->out_count = chain->readable;
	task->out_bytes = chain->readable_bytes;
	task->in = chain_writable(chain);
	task->in_count = chain->writable;
	task->in_bytes = chain->writable_bytes;
	take_response(request);
	prepare_task(request, &header);
}

/* --- request queues --------------------------------------------------------------------------------- */

static void free_requests(struct queue *base)
{
	struct request_queue *queue = (struct request_queue *)base;
	struct request_queue **link = &queue->device->queues;

	while (*link != queue) {
		link = &(*link)->next;
	}
	*link = queue->next;
	free(queue);
}

static const struct queue_ops request_ops = {
    .request_size = sizeof(struct scsi_request),
    .extra_size = sizeof(struct scsi_extra),
    .start = start,
    .submit = submit,
    .free = free_requests,
};

static struct queue *requests_start(struct reactor *reactor, struct guest_memory *memory,
				    struct scsi_device *device, const struct vq_setup *vq, uint32_t slot)
{
	struct request_queue *queue = calloc(1, sizeof(*queue));
	int rc;

	if (queue == NULL) {
		errno = ENOMEM;
		return NULL;
	}
	queue->device = device;
	rc = queue_start(&queue->base, &request_ops, reactor, memory, vq, slot);
	if (rc < 0) {
		free(queue);
		errno = -rc;
		return NULL;
	}
	queue->next = device->queues;
	device->queues = queue;
	return &queue->base;
}

struct queue *scsi_queue_start(struct reactor *reactor, struct guest_memory *memory, struct scsi_device *device,
			       uint32_t index, const struct vq_setup *vq, uint32_t slot)
{
	switch (index) {
	case SCSI_CONTROL_QUEUE:
		return scsi_control_start(reactor, memory, device, vq, slot);
	case SCSI_EVENT_QUEUE:
		return scsi_events_start(reactor, memory, device, vq, slot);
	default:
		return requests_start(reactor, memory, device, vq, slot);
	}
}

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
