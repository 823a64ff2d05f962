/*
 * Submission: commands gather in the queue during a turn, and one write to the doorbell at its end tells the
 * device of all of them. Completion: while hot, the poller looks at the phase bit of the next entry, and
 * writes the other doorbell once for all that it found. With nothing in flight it sleeps, at no cost at all,
 * until the next submission; with something in flight it sleeps when the device has an interrupt for it.
 */
#include "bdev/nvme_queue.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#define BATCH 64 /* completions a turn */

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

/* --- doorbells -------------------------------------------------------------------------------------- */

/*
 * Tell the device of a new index. Where it reads shadow doorbells, it says in the event index from where on
 * it wants to be told by a write to the doorbell proper. Returns whether the device was written to.
 */
static bool ring_doorbell(struct nvme_queue *queue, unsigned which, volatile uint32_t *doorbell, uint32_t old,
			  uint32_t value)
{
	/* The entries are written before whoever reads the index can see it. */
	atomic_thread_fence(memory_order_release);
	if (unlikely(queue->shadow[which] != NULL)) {
		uint16_t event;

		*queue->shadow[which] = value;
		/* The device writes the event index, then looks at the shadow; we do the reverse. */
		atomic_thread_fence(memory_order_seq_cst);
		event = (uint16_t)*queue->event[which];
		if ((uint16_t)(value - event - 1) >= (uint16_t)(value - old)) {
			return false;
		}
	}
	*doorbell = value;
	return true;
}

static void ring_submissions(struct deferred *deferred)
{
	struct nvme_queue *queue = container_of(deferred, struct nvme_queue, ring);

	if (queue->state != NVME_RUNNING || queue->tail == queue->rung) {
		return;
	}
	queue->watch->commands += (queue->tail < queue->rung ? queue->depth : 0) + queue->tail - queue->rung;
	queue->watch->submission_doorbells +=
	    ring_doorbell(queue, 0, queue->submission_doorbell, queue->rung, queue->tail);
	queue->rung = queue->tail;
	if (!queue->poller.link) {
		poller_wake(&queue->poller);
	}
}

/* --- submission ------------------------------------------------------------------------------------- */

static void enqueue(struct nvme_queue *queue, struct nvme_slot *slot)
{
	if (slot->plain) {
		nvme_command_again(slot, nvme_queue_entry(queue));
	} else {
		*nvme_queue_entry(queue) = slot->command;
	}
	nvme_queue_push(queue, slot);
}

void nvme_queue_submit(struct nvme_queue *queue, struct nvme_slot *slot)
{
	nvme_queue_take(queue, slot);
	slot->command.cid = slot->cid;
	slot->attempts = 0;
	slot->plain = false;
	enqueue(queue, slot);
}

static void set_straight(struct nvme_queue *queue)
{
	queue->straight = queue->state == NVME_RUNNING && !queue->waiting;
}

void nvme_queue_wait(struct nvme_queue *queue, struct bdev_io *io)
{
	io->next = NULL;
	*queue->waiting_end = io;
	queue->waiting_end = &io->next;
	queue->watch->waits++;
	set_straight(queue);
}

static struct bdev_io *take_waiting(struct nvme_queue *queue)
{
	struct bdev_io *io = queue->waiting;

	queue->waiting = io->next;
	if (!queue->waiting) {
		queue->waiting_end = &queue->waiting;
	}
	return io;
}

/* Let those that wait go on, in their order, as far as they come. */
static void serve_waiting(struct nvme_queue *queue)
{
	while (queue->waiting && (queue->free_count || queue->state == NVME_DEAD)) {
		struct bdev_io *io = take_waiting(queue);

		if (!nvme_request_go_on(io)) {
			io->next = queue->waiting; /* still the first */
			queue->waiting = io;
			if (!io->next) {
				queue->waiting_end = &io->next;
			}
			break;
		}
	}
	set_straight(queue);
}

/* --- completion ------------------------------------------------------------------------------------- */

static int to_errno(unsigned status)
{
	switch (status) {
	case NVME_INVALID_OPCODE:
		return -EOPNOTSUPP;
	case NVME_INVALID_FIELD:
		return -EINVAL;
	case NVME_INVALID_NAMESPACE:
		return -ENODEV;
	case NVME_WRITE_PROTECTED:
	case NVME_READ_ONLY_RANGE:
		return -EROFS;
	case NVME_LBA_OUT_OF_RANGE:
		return -ERANGE;
	case NVME_CAPACITY_EXCEEDED:
		return -ENOSPC;
	case NVME_RESERVATION_CONFLICT:
		return -EBADE;
	case NVME_UNRECOVERED_READ:
		return -ENODATA;
	case NVME_GUARD_ERROR:
	case NVME_APPLICATION_TAG_ERROR:
	case NVME_REFERENCE_TAG_ERROR:
	case NVME_COMPARE_FAILURE:
		return -EILSEQ;
	case NVME_ACCESS_DENIED:
		return -EACCES;
	default:
		return -EIO;
	}
}

static void put_slot(struct nvme_queue *queue, struct nvme_slot *slot)
{
	slot->io = NULL;
	slot->next = queue->free;
	queue->free = slot;
	queue->free_count++;
}

static void finish(struct nvme_queue *queue, struct nvme_slot *slot, int status)
{
	struct bdev_io *io = slot->io;

	queue->watch->started[slot->cid] = 0;
	if (likely(slot->plain)) {
		put_slot(queue, slot);
		bdev_complete(io, status);
		return;
	}
	nvme_command_done(queue, slot, status);
	put_slot(queue, slot);
}

__attribute__((noinline, cold)) static void command_failed(struct nvme_queue *queue, struct nvme_slot *slot,
							   uint16_t status)
{
	bool passes = !NVME_STATUS_DO_NOT_RETRY(status) && NVME_STATUS(status) != NVME_COMPARE_FAILURE;

	if (passes && slot->attempts < queue->retries) {
		slot->attempts++;
		queue->watch->retries++;
		enqueue(queue, slot);
		return;
	}
	finish(queue, slot, to_errno(NVME_STATUS(status)));
}

static void stop(struct nvme_queue *queue)
{
	queue->state = NVME_PAUSED;
	set_straight(queue);
	poller_stop(&queue->poller);
	reactor_cancel(queue->reactor, &queue->ring);
}

__attribute__((noinline, cold)) static void broken(struct nvme_queue *queue, uint16_t cid)
{
	snprintf(queue->watch->text, sizeof(queue->watch->text),
		 "the device completed command %u, which is not in flight (entry %u of its completion queue)",
		 cid, queue->head);
	stop(queue);
	__atomic_store_n(&queue->watch->broken, 1, __ATOMIC_RELEASE);
}

/* The last dword of the next entry: the identifier below, the status with the phase bit above. */
static uint32_t next_completion(const struct nvme_queue *queue)
{
	return *(volatile uint32_t *)&queue->completion[queue->head].cid;
}

static bool has_completion(const struct nvme_queue *queue)
{
	return (next_completion(queue) >> 16 & 1) == queue->phase;
}

static int queue_run(struct poller *poller)
{
	struct nvme_queue *queue = container_of(poller, struct nvme_queue, poller);
	uint32_t old = queue->head;
	int count = 0;

	while (count < BATCH) {
		uint32_t last = next_completion(queue);
		uint32_t cid = last & 0xffff, status = last >> 16;
		struct nvme_slot *slot;

		if ((status & 1) != queue->phase) {
			break;
		}
		/* The device writes the phase bit last: the data are there. */
		atomic_thread_fence(memory_order_acquire);
		slot = &queue->slots[cid];
		if (unlikely(cid >= queue->depth - 1 || !slot->io)) {
			broken(queue, (uint16_t)cid);
			return count + 1;
		}
		if (++queue->head == queue->depth) {
			queue->head = 0;
			queue->phase ^= 1;
		}
		count++;
		if (likely(NVME_STATUS(status) == NVME_SUCCESS)) {
			finish(queue, slot, 0);
		} else {
			command_failed(queue, slot, (uint16_t)status);
		}
	}
	if (count) {
		queue->watch->completions += count;
		queue->watch->completion_doorbells +=
		    ring_doorbell(queue, 1, queue->completion_doorbell, old, queue->head);
		serve_waiting(queue);
	}
	return count;
}

static int queue_sleep(struct poller *poller)
{
	struct nvme_queue *queue = container_of(poller, struct nvme_queue, poller);

	if (queue->free_count == queue->depth - 1) {
		return 0; /* nothing in flight: submission wakes us */
	}
	/* Every completion signals the interrupt's eventfd, which is another edge each time: none is lost. */
	return queue->interrupt.fd < 0 || has_completion(queue);
}

static void interrupted(struct fd_watch *watch)
{
	poller_wake(&container_of(watch, struct nvme_queue, interrupt)->poller);
}

void nvme_queue_init(struct nvme_queue *queue)
{
	queue->waiting_end = &queue->waiting;
	queue->ring.run = ring_submissions;
	queue->interrupt = (struct fd_watch){.ready = interrupted, .fd = -1};
	queue->poller = (struct poller){.run = queue_run, .sleep = queue_sleep};
}

/* --- reset and removal of the controller ------------------------------------------------------------ */

uint32_t nvme_queue_in_flight(const struct nvme_queue *queue)
{
	return queue->depth - 1 - queue->free_count;
}

void nvme_queue_pause(struct nvme_queue *queue)
{
	if (queue->state == NVME_RUNNING) {
		queue_run(&queue->poller); /* what has completed need not be done again */
	}
	if (queue->state == NVME_RUNNING) {
		stop(queue);
	}
}

void nvme_queue_begin(struct nvme_queue *queue)
{
	memset((void *)queue->completion, 0, queue->depth * sizeof(*queue->completion));
	queue->head = queue->tail = queue->rung = 0;
	queue->phase = 1;
	queue->state = NVME_RUNNING;
	set_straight(queue);
	poller_start(queue->reactor, &queue->poller);
}

void nvme_queue_resume(struct nvme_queue *queue)
{
	if (queue->state == NVME_RUNNING || !queue->registers) {
		return;
	}
	queue->watch->broken = 0;
	nvme_queue_begin(queue);
	for (uint32_t i = 0; i < queue->depth - 1; i++) {
		struct nvme_slot *slot = &queue->slots[i];

		if (slot->io && slot->attempts < queue->retries) {
			slot->attempts++;
			queue->watch->retries++;
			enqueue(queue, slot);
		} else if (slot->io) {
			finish(queue, slot, -EIO);
		}
	}
	serve_waiting(queue);
}

void nvme_queue_fail(struct nvme_queue *queue)
{
	if (queue->state == NVME_RUNNING) {
		stop(queue);
	}
	queue->state = NVME_DEAD;
	for (uint32_t i = 0; i < queue->depth - 1; i++) {
		if (queue->slots[i].io) {
			finish(queue, &queue->slots[i], -ENODEV);
		}
	}
	serve_waiting(queue);
}

void nvme_queue_detach(struct nvme_queue *queue)
{
	nvme_queue_fail(queue);
	if (queue->registers) {
		nvme_registers_unmap(queue->registers);
		queue->registers = NULL;
	}
}
