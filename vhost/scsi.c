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

#define READ_10 0x28 /* and WRITE (10), which differs in */
#define WRITES 0x02
#define KEPT_BUFFER 4096 /* of a request's buffer: what is beyond goes back to the system after use */

_Static_assert(sizeof(struct fence_set) == sizeof(((struct scsi_management *)0)->nexuses), "the same set");

/* --- ending ----------------------------------------------------------------------------------------- */

static inline __attribute__((always_inline)) void complete(struct scsi_request *request)
{
	const struct scsi_task *task = &request->task;
	uint64_t moved = task->transferred;

	if (unlikely(queue_logs(&request->base))) {
		scsi_log_written(request);
	}
	queue_complete(&request->base, (uint32_t)(SCSI_RESPONSE_SIZE + (task->in_bytes != 0 ? moved : 0)),
		       moved);
}

/* How much less was moved than there are buffers for. */
static inline uint32_t residual_of(const struct scsi_task *task)
{
	uint64_t expected = task->in_bytes != 0 ? task->in_bytes : task->out_bytes;

	return task->transferred > expected ? 0 : (uint32_t)(expected - task->transferred);
}

/* End a request that never became a task, or that has been one. */
static __attribute__((noinline)) void finish(struct scsi_request *request, enum scsi_response code)
{
	const struct scsi_task *task = &request->task;
	struct scsi_command_response response = {
	    .sense_length = task->sense_length,
	    .residual = code == RESPONSE_OVERRUN ? 0 : residual_of(task),
	    .status = task->status,
	    .response = (uint8_t)code,
	};
	/* Memory of the driver that is no data is not written beyond the sense data. */
	size_t size = SCSI_RESPONSE_HEAD + task->sense_length;

	memcpy(response.sense, task->sense, task->sense_length);
	if (request->response != NULL) {
		memcpy(request->response, &response, size);
	} else {
		scsi_put_pieces(request, &response, size);
	}
	complete(request);
}

/* The end of a task that has more to tell than GOOD. */
static __attribute__((noinline)) void finish_other(struct scsi_request *request)
{
	struct scsi_task *task = &request->task;

	queue_count_io(request->base.queue, &task->io, task->status == SCSI_GOOD ? 0 : -EIO);
	if (task->buffer_used) {
		madvise(task->buffer + KEPT_BUFFER, SCSI_BUFFER_SIZE - KEPT_BUFFER, MADV_DONTNEED);
	}
	if (task->aborted != SCSI_NOT_ABORTED) {
		finish(request, task->aborted == SCSI_ABORTED ? RESPONSE_ABORTED : RESPONSE_RESET);
	} else {
		finish(request, task->overrun ? RESPONSE_OVERRUN : RESPONSE_OK);
	}
}

/* The head of a response that is GOOD is put together in registers: as few stores as can be. */
static void finished(struct scsi_task *task)
{
	struct scsi_request *request =
	    (struct scsi_request *)((char *)task - offsetof(struct scsi_request, task));
	uint64_t counts;
	uint32_t codes = 0;

	if (unlikely(task->outcome != 0 || request->response == NULL)) {
		finish_other(request);
		return;
	}
	counts = (uint64_t)residual_of(task) << 32;
	memcpy(request->response, &counts, sizeof(counts));
	memcpy(request->response + sizeof(counts), &codes, sizeof(codes));
	queue_count_io(request->base.queue, &task->io, 0);
	complete(request);
}

/* --- framing: header first, then Data-Out; response first, then Data-In ------------------------------- */

/*
 * Take the header off the front of Data-Out. It stays where it is as a rule, the driver's memory, so that each
 * byte is to be read once. NULL: there is too little.
 */
static inline const uint8_t *take_header(struct scsi_request *request)
{
	struct vq_chain *chain = &request->base.chain;
	struct scsi_task *task = &request->task;
	const uint8_t *header;

	if (likely(chain->readable > 0 && chain->iov->iov_len == SCSI_HEADER_SIZE)) {
		task->out = chain->iov + 1;
		task->out_count = chain->readable - 1;
		task->out_bytes = chain->readable_bytes - SCSI_HEADER_SIZE;
		return chain->iov->iov_base;
	}
	header = scsi_take_header_pieces(request);
	task->out = chain->iov;
	task->out_count = chain->readable;
	task->out_bytes = chain->readable_bytes;
	return header;
}

/* Take the response's place out of the front of Data-In, which has as many bytes. */
static inline void take_response(struct scsi_request *request)
{
	const struct vq_chain *chain = &request->base.chain;
	struct iovec *iov = chain_writable(chain);
	struct scsi_task *task = &request->task;

	task->in_bytes = chain->writable_bytes - SCSI_RESPONSE_SIZE;
	if (likely(iov->iov_len == SCSI_RESPONSE_SIZE)) {
		request->response = iov->iov_base;
		__builtin_prefetch(request->response, 1);
		task->in = iov + 1;
		task->in_count = chain->writable - 1;
	} else {
		task->in = iov;
		task->in_count = chain->writable;
		scsi_take_response_pieces(request);
	}
}

/* --- starting --------------------------------------------------------------------------------------- */

static inline struct request_queue *queue_of(const struct scsi_request *request)
{
	return (struct request_queue *)request->base.queue;
}

/* A hint, of what most requests are: one that is wrong is found out later. Inlined: see bdev_prefetch(). */
static inline __attribute__((always_inline)) void prefetch(const struct scsi_task *task)
{
	const struct bdev *bdev = task->unit != NULL ? task->unit->bdev : NULL;

	if (likely(bdev != NULL) && bdev->memory != NULL && (task->cdb[0] & ~WRITES) == READ_10) {
		bdev_prefetch(bdev, (uint64_t)get_be32(task->cdb + 2) * bdev->block_size,
			      (uint64_t)get_be16(task->cdb + 7) * bdev->block_size, task->cdb[0] & WRITES);
	}
}

/* Most requests are for the unit of the one before. */
static __attribute__((noinline)) bool find_address(struct request_queue *queue, uint64_t lun)
{
	struct scsi_address address;

	if (!scsi_parse_lun((const uint8_t *)&lun, &address)) {
		return false;
	}
	queue->lun = lun;
	queue->address = address;
	return true;
}

/* Which unit a task is for: true, or the request has ended. */
static inline bool find_unit(struct request_queue *queue, struct scsi_request *request, uint64_t lun)
{
	struct scsi_task *task = &request->task;
	struct scsi_target *target;

	if (unlikely(lun != queue->lun) && !find_address(queue, lun)) {
		finish(request, RESPONSE_BAD_TARGET);
		return false;
	}
	request->address = queue->address;
	target = queue->device->targets[queue->address.target];
	if (unlikely(target == NULL)) {
		finish(request, RESPONSE_BAD_TARGET);
		return false;
	}
	task->target = target;
	if (likely(queue->address.lun < SCSI_MAX_UNITS)) {
		task->unit = target->units[queue->address.lun];
	} else {
		task->unit = NULL;
		task->well_known = queue->address.lun == WELL_KNOWN_LUN;
	}
	return true;
}

static void start(struct queue_request *base)
{
	struct scsi_request *request = (struct scsi_request *)base;
	struct request_queue *queue = queue_of(request);
	const struct vq_chain *chain = &base->chain;
	struct scsi_task *task = &request->task;
	const uint8_t *header;
	uint64_t lun;

	task->outcome = 0;
	task->transferred = 0;
	task->io.submitted = 0; /* nothing to be counted yet */
	/* Without room for a response, all that the driver can be told is that the request is over. */
	if (unlikely(chain->writable_bytes < SCSI_RESPONSE_SIZE || chain->writable_bytes > UINT32_MAX)) {
		queue_complete(base, 0, 0);
		return;
	}
	header = take_header(request);
	take_response(request);
	if (unlikely(header == NULL)) {
		finish(request, RESPONSE_FAILURE);
		return;
	}
	memcpy(&lun, header + offsetof(struct scsi_command_header, lun), sizeof(lun));
	memcpy(&task->tag, header + offsetof(struct scsi_command_header, tag), sizeof(task->tag));
	memcpy(task->cdb, header + offsetof(struct scsi_command_header, cdb), SCSI_CDB_SIZE);
	task->peculiar = 0;
	task->attribute = header[offsetof(struct scsi_command_header, attribute)] & 7;
	request->serial = queue->device->serial;
	if (unlikely(base->again)) {
		task->again = true;
		request->serial = 0; /* it began before whatever is asked of this process */
	}
	if (likely(find_unit(queue, request, lun))) {
		if (queue->ready_count == 0) {
			prefetch(task);
		}
		queue->ready[queue->ready_count++] = request;
	}
}

/* The beginning of the next one's data is on its way while one is copied: see submit() in blk.c. */
static void submit(struct queue *base)
{
	struct request_queue *queue = (struct request_queue *)base;

	for (uint32_t i = 0; i < queue->ready_count; i++) {
		if (likely(i + 1 < queue->ready_count)) {
			prefetch(&queue->ready[i + 1]->task);
		}
		scsi_task_start(&queue->ready[i]->task);
	}
	queue->ready_count = 0;
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
    .frame = {.header = SCSI_HEADER_SIZE, .response = SCSI_RESPONSE_SIZE},
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
	    .target = request->address.target,
	    .lun = request->address.lun,
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

/* What stays the same for all requests of a slot. */
static void prepare_tasks(struct request_queue *queue, uint32_t count)
{
	struct scsi_extra *extra = (struct scsi_extra *)(void *)queue->base.extra;

	for (uint32_t slot = 0; slot < count; slot++) {
		struct scsi_task *task = &scsi_request_at(queue, slot)->task;

		task->buffer = extra[slot].buffer;
		task->done = finished;
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
	prepare_tasks(queue, vq->size);
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
