/*
 * Commands: start() copies a request's header out of guest memory and makes a task of it, whose buffers are
 * the guest's own; finished() writes the response in front of them.
 */
#include "vhost/scsi.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "scsi/fence.h"
#include "vhost/ring.h"

#define RESPONSE_SIZE sizeof(struct scsi_command_response)
#define RESPONSE_HEAD offsetof(struct scsi_command_response, sense)
#define KEPT_BUFFER 4096 /* of a request's buffer: what is beyond goes back to the system after use */

struct scsi_extra {
	struct queue_request_extra base;
	struct iovec response[RESPONSE_SIZE]; /* a driver may cut it to bytes */
	uint8_t buffer[SCSI_BUFFER_SIZE] __attribute__((aligned(4096)));
};

_Static_assert(sizeof(struct fence_set) == sizeof(((struct scsi_management *)0)->nexuses), "the same set");
_Static_assert(sizeof(struct scsi_extra) % 4096 == 0, "buffers are whole pages");

bool scsi_parse_lun(const uint8_t *lun, uint32_t *target, uint32_t *number)
{
	uint64_t word = get_be64(lun);
	uint32_t level = word >> 32 & 0xffff;

	*target = word >> 48 & 0xff;
	if (unlikely(word >> 56 != 1 || (uint32_t)word != 0)) {
		return false;
	}
	if (unlikely(level == 0xc101)) {
		*number = WELL_KNOWN_LUN;
		return true;
	}
	/* Flat space or peripheral device addressing. What we do not have, 256 and more, is no unit. */
	*number = level & 0x3fff;
	if (unlikely(*number >= SCSI_MAX_UNITS)) {
		*number = SCSI_MAX_UNITS + 1;
	}
	return level >> 8 == 0 || level >> 14 == 1;
}

/* --- ending ----------------------------------------------------------------------------------------- */

/* Copy to a response that the driver has cut into pieces. */
static void put_pieces(const struct scsi_request *request, const void *response, size_t size)
{
	const struct iovec *iov = request->response;

	for (size_t done = 0; done < size; iov++) {
		size_t part = iov->iov_len < size - done ? iov->iov_len : size - done;

		memcpy(iov->iov_base, (const uint8_t *)response + done, part);
		done += part;
	}
}

static __attribute__((noinline)) void put_long_response(const struct scsi_request *request, uint64_t counts,
							uint32_t codes)
{
	const struct scsi_task *task = &request->task;
	struct scsi_command_response response;

	memcpy(&response, &counts, sizeof(counts));
	memcpy((uint8_t *)&response + sizeof(counts), &codes, sizeof(codes));
	memcpy(response.sense, task->sense, task->sense_length);
	put_pieces(request, &response, RESPONSE_HEAD + task->sense_length);
}

/*
 * Memory of the driver that is no data is not written beyond the sense data. The head of a response is put
 * together in registers: bytes that were stored one by one are slow to load as a whole.
 */
static inline void put_response(const struct scsi_request *request, uint32_t residual, enum scsi_response code)
{
	const struct scsi_task *task = &request->task;
	uint64_t counts = task->sense_length | (uint64_t)residual << 32;
	uint32_t codes = (uint32_t)task->status << 16 | (uint32_t)code << 24;

	if (likely(request->response_count == 1 && task->sense_length == 0)) {
		uint8_t *out = request->response->iov_base;

		memcpy(out, &counts, sizeof(counts));
		memcpy(out + sizeof(counts), &codes, sizeof(codes));
	} else {
		put_long_response(request, counts, codes);
	}
}

/* For a migration: what a command may have written is its Data-In and its response. */
static void log_written(struct scsi_request *request)
{
	const struct iovec *piece = request->response;

	queue_log_written(&request->base, request->task.in_bytes, NULL, 0);
	for (uint32_t i = 0; i < request->response_count; i++) {
		queue_log_written(&request->base, 0, piece[i].iov_base, piece[i].iov_len);
	}
}

/* End a request that never became a task, or that has been one. */
static inline __attribute__((always_inline)) void finish(struct scsi_request *request, enum scsi_response code)
{
	const struct scsi_task *task = &request->task;
	uint64_t expected = task->in_bytes != 0 ? task->in_bytes : task->out_bytes;
	uint64_t moved = task->transferred;

	put_response(request, code == RESPONSE_OVERRUN || moved > expected ? 0 : (uint32_t)(expected - moved),
		     code);
	request->active = false;
	if (unlikely(queue_logs(&request->base))) {
		log_written(request);
	}
	queue_complete(&request->base, (uint32_t)(RESPONSE_SIZE + (task->in_bytes != 0 ? moved : 0)), moved);
}

static void finished(struct scsi_task *task)
{
	struct scsi_request *request =
	    (struct scsi_request *)((char *)task - offsetof(struct scsi_request, task));

	if (unlikely(task->buffer_used)) {
		madvise(task->buffer + KEPT_BUFFER, SCSI_BUFFER_SIZE - KEPT_BUFFER, MADV_DONTNEED);
	}
	queue_count_io(request->base.queue, &task->io, task->status == SCSI_GOOD ? 0 : -EIO);
	if (unlikely(task->aborted != SCSI_NOT_ABORTED)) {
		finish(request, task->aborted == SCSI_ABORTED ? RESPONSE_ABORTED : RESPONSE_RESET);
	} else {
		finish(request, unlikely(task->overrun) ? RESPONSE_OVERRUN : RESPONSE_OK);
	}
}

/* --- framing: header first, then Data-Out; response first, then Data-In ------------------------------- */

/* What a header says: the CDB is copied to where it stays. */
struct address {
	uint8_t lun[8];
	uint64_t tag;
	uint8_t attribute;
};

static void read_header(const uint8_t *from, struct address *address, uint8_t *cdb)
{
	memcpy(address->lun, from + offsetof(struct scsi_command_header, lun), sizeof(address->lun));
	memcpy(&address->tag, from + offsetof(struct scsi_command_header, tag), sizeof(address->tag));
	address->attribute = from[offsetof(struct scsi_command_header, attribute)];
	memcpy(cdb, from + offsetof(struct scsi_command_header, cdb), SCSI_CDB_SIZE);
}

static bool take_header(struct vq_chain *chain, struct address *address, uint8_t *cdb)
{
	const size_t size = sizeof(struct scsi_command_header);
	struct scsi_command_header header;

	if (unlikely(chain->readable_bytes < size)) {
		return false;
	}
	/* The writable part stays where it is, and follows the readable one. */
	if (likely(chain->iov->iov_len == size)) {
		read_header(chain->iov->iov_base, address, cdb);
		chain->iov++;
		chain->readable--;
		chain->readable_bytes -= size;
	} else {
		chain_take(chain, &header, size);
		read_header((const uint8_t *)&header, address, cdb);
	}
	return true;
}

/* The same of a driver that has cut its buffers elsewhere. */
static __attribute__((noinline)) void take_response_pieces(struct scsi_request *request)
{
	struct scsi_task *task = &request->task;
	size_t left = RESPONSE_SIZE;

	if (task->in->iov_len < RESPONSE_SIZE) {
		request->response = ((struct scsi_extra *)queue_request_extra(&request->base))->response;
	}
	request->response_count = 0;
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

/* Take the response's place out of the front of Data-In, which has as many bytes. */
static inline void take_response(struct scsi_request *request)
{
	struct scsi_task *task = &request->task;

	task->in_bytes -= RESPONSE_SIZE;
	request->response = &request->response_iov;
	if (likely(task->in->iov_len == RESPONSE_SIZE)) {
		request->response_iov = *task->in++;
		request->response_count = 1;
		task->in_count--;
	} else {
		take_response_pieces(request);
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

/* Most requests are for the unit of the one before. */
static inline bool find_lun(struct request_queue *queue, const uint8_t *lun, struct scsi_request *request)
{
	uint64_t word;

	memcpy(&word, lun, sizeof(word));
	if (unlikely(word != queue->lun)) {
		if (!scsi_parse_lun(lun, &request->target, &request->lun)) {
			return false;
		}
		queue->lun = word;
		queue->target = request->target;
		queue->number = request->lun;
		return true;
	}
	request->target = queue->target;
	request->lun = queue->number;
	return true;
}

static void prepare_task(struct scsi_request *request, const struct address *address)
{
	struct request_queue *queue = queue_of(request);
	struct scsi_device *device = queue->device;
	struct scsi_task *task = &request->task;

	if (unlikely(!find_lun(queue, address->lun, request)) ||
	    unlikely(device->targets[request->target] == NULL)) {
		finish(request, RESPONSE_BAD_TARGET);
		return;
	}
	task->target = device->targets[request->target];
	task->unit = likely(request->lun < SCSI_MAX_UNITS) ? task->target->units[request->lun] : NULL;
	task->well_known = request->lun == WELL_KNOWN_LUN;
	task->attribute = address->attribute & 7;
	task->tag = address->tag;
	task->again = request->base.again;
	task->aborted = SCSI_NOT_ABORTED;
	if (unlikely(task->buffer == NULL)) { /* once for each slot */
		task->buffer = ((struct scsi_extra *)queue_request_extra(&request->base))->buffer;
		task->done = finished;
	}
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
	struct address address;

	task->status = 0;
	task->sense_length = 0;
	task->transferred = 0;
	task->io.submitted = 0; /* nothing to be counted yet */
	/* Without room for a response, all that the driver can be told is that the request is over. */
	if (unlikely(chain->writable_bytes < RESPONSE_SIZE || chain->writable_bytes > UINT32_MAX)) {
		queue_complete(base, 0, 0);
		return;
	}
	request->active = true;
	/* What another process has left began before whatever is asked of this one. */
	request->serial = unlikely(base->again) ? 0 : queue_of(request)->device->serial;
	if (unlikely(!take_header(chain, &address, task->cdb))) {
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
	prepare_task(request, &address);
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
    .frame = {.header = sizeof(struct scsi_command_header), .response = RESPONSE_SIZE},
    .start = start,
    .submit = submit,
    .free = free_requests,
};

/* PREEMPT AND ABORT: others' tasks are in other devices. */
void scsi_abort_others(struct scsi_task *task)
{
	scsi_ask(&((struct scsi_request *)((char *)task - offsetof(struct scsi_request, task)))->base);
}

static void preempt_asked(const struct scsi_request *request, struct scsi_management *what)
{
	*what = (struct scsi_management){
	    .function = SCSI_PREEMPT,
	    .target = request->target,
	    .lun = request->lun,
	};
	memcpy(what->nexuses, fence_set_of(&request->task), sizeof(what->nexuses));
}

void scsi_queue_asked(struct queue *queue, uint32_t slot, struct scsi_management *what)
{
	if (queue->ops == &request_ops) {
		preempt_asked(scsi_request_at((struct request_queue *)queue, slot), what);
	} else {
		scsi_control_asked(queue, slot, what);
	}
}

void scsi_queue_answer(struct queue *queue, uint32_t slot, int found)
{
	if (queue->ops == &request_ops) {
		struct scsi_task *task = &scsi_request_at((struct request_queue *)queue, slot)->task;

		/* Whatever could not be aborted is waited for. */
		task->next(task);
	} else {
		scsi_control_answer(queue, slot, found);
	}
}

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
	queue->lun = 1; /* LUN 0 of target 0 */
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
