/*
 * A queue pair of an NVMe controller, lent to this reactor by the control process: a submission queue, its
 * completion queue, and the memory that goes with them. All namespaces of the controller that the reactor
 * serves share it.
 *
 * What a command was, or what it was made from, is kept in a slot, in private memory, until its completion
 * has been seen. So a controller that was reset gets everything again that it had, and nothing that the
 * device writes decides more than whether an identifier is one that is in use.
 *
 * The control process deletes and remakes queue pairs; it knows their state from struct nvme_watch, which is
 * shared memory and so outlives the reactor.
 */
#ifndef BDEV_NVME_QUEUE_H
#define BDEV_NVME_QUEUE_H

#include <stdbool.h>
#include <stdint.h>

#include "bdev/bdev.h"
#include "bdev/nvme_data.h"
#include "bdev/nvme_registers.h"
#include "bdev/nvme_spec.h"

/* cffi: begin */
#define NVME_BOUNCE_SIZE 65536
#define NVME_WATCH_TEXT 128

/* Where the parts of a queue pair's memory stand, all at multiples of a page: offsets, and the whole. */
struct nvme_queue_layout {
	uint64_t submission; /* depth entries */
	uint64_t completion; /* depth entries */
	uint64_t lists;	     /* a page a slot: of PRPs, SGL descriptors, or ranges */
	uint64_t bounce;     /* buffers of NVME_BOUNCE_SIZE */
	uint64_t zeroes;     /* NVME_BOUNCE_SIZE of them, never written */
	uint64_t shared;     /* how much of it the device sees: all above */
	uint64_t watch;	     /* struct nvme_watch, with depth entries; not for the device */
	uint64_t size;
};

void nvme_queue_layout(uint32_t depth, uint32_t bounces, struct nvme_queue_layout *layout);

/* Written by the reactor alone, read by the control process. */
struct nvme_watch {
	uint64_t commands; /* submitted, those that were submitted again included */
	uint64_t completions;
	uint64_t submission_doorbells; /* writes to the device */
	uint64_t completion_doorbells;
	uint64_t bounced; /* commands by way of a bounce buffer */
	uint64_t retries; /* commands submitted again after an error */
	uint64_t waits;	  /* requests that had to wait for a slot or a bounce buffer */
	uint32_t broken;  /* the device broke the rules: text says how; the queue has stopped */
	uint32_t reserved;
	char text[NVME_WATCH_TEXT];
	uint64_t started[]; /* by command identifier: ticks at its submission, 0 when not in use */
};

struct nvme_queue_setup {
	uint64_t key;	/* who this queue pair is: one that is open already is shared */
	int memory;	/* memfd; descriptors stay the caller's */
	int registers;	/* of the device, or a file that stands in for it */
	int interrupt;	/* eventfd; -1: none, the queue is polled while anything is in flight */
	int shadow;	/* memfd of shadow doorbells and event indices, a page each; -1: none */
	uint32_t depth; /* entries of each queue, 2 or more */
	uint32_t bounces;
	uint64_t iova; /* where the device sees the memory */
	uint64_t registers_offset;
	uint64_t registers_size;
	uint32_t submission_doorbell; /* offsets in the registers */
	uint32_t completion_doorbell;
	uint32_t retries; /* how often a command is tried again */
	bool direct;	  /* data may move to and from memory that dma.h knows, without a copy */
	uint32_t sgl;	  /* 0: no SGLs; else the alignment that they demand: 1 or 4 */
};

struct nvme_queue;

/* The open queue pair with this key, or NULL. */
struct nvme_queue *nvme_queue_find(uint64_t key);
/* Submit nothing and look at no completion any more; requests wait. */
void nvme_queue_pause(struct nvme_queue *queue);
/* The controller has made the queue pair anew: submit again what was in flight. */
void nvme_queue_resume(struct nvme_queue *queue);
/* The controller does no more DMA: fail everything with -ENODEV, now and until it is resumed. */
void nvme_queue_fail(struct nvme_queue *queue);
/* The controller goes away for good: fail everything, and let go of its registers. */
void nvme_queue_detach(struct nvme_queue *queue);
uint32_t nvme_queue_in_flight(const struct nvme_queue *queue);
/* cffi: end */

#define NVME_NO_BOUNCE 0xffff

/*
 * A command, from its submission until its completion. A plain one is a whole request on one piece of memory:
 * it follows from the request and @iova, and is not kept.
 */
struct nvme_slot {
	struct bdev_io *io;	/* NULL: the slot is free */
	struct nvme_slot *next; /* free one */
	uint64_t iova;		/* of a plain command's data */
	uint16_t cid;		/* its own index */
	uint16_t bounce;	/* index, or NVME_NO_BOUNCE */
	uint16_t more;		/* the same, of a buffer that holds what its list has no room for */
	uint8_t attempts;
	bool plain;
	uint32_t length;
	uint64_t offset; /* of the command's data in those of the request */
	struct nvme_command command;
} __attribute__((aligned(64)));

enum nvme_queue_state { NVME_RUNNING, NVME_PAUSED, NVME_DEAD };

struct nvme_queue {
	/* Submission. */
	struct nvme_command *submission;
	volatile uint32_t *submission_doorbell;
	uint32_t tail;
	uint32_t rung; /* the tail that the device knows */
	uint32_t depth;
	uint32_t free_count;
	bool straight; /* it runs and nobody waits: the next request may take a slot at once */
	struct nvme_slot *free;
	struct nvme_slot *slots; /* depth - 1: a full queue has one entry unused */
	/* Completion. */
	volatile struct nvme_completion *completion;
	volatile uint32_t *completion_doorbell;
	uint32_t head;
	uint32_t phase;

	struct nvme_watch *watch;
	struct reactor *reactor;
	struct poller poller;
	struct deferred ring;
	struct bdev_io *waiting; /* for a slot or a bounce buffer, oldest first */
	struct bdev_io **waiting_end;
	enum nvme_queue_state state;

	uint8_t *memory;
	uint64_t iova;
	struct nvme_queue_layout layout;
	uint32_t bounce_count;
	uint32_t bounces;
	uint16_t *bounce_free;
	bool direct;
	uint32_t sgl;
	uint32_t retries;

	/* Shadow doorbells (Base annex B.5), or NULL: submission at 0, completion at 1. */
	volatile uint32_t *shadow[2];
	volatile uint32_t *event[2];
	void *shadow_map;

	struct fd_watch interrupt;
	struct nvme_registers *registers; /* NULL once detached */
	struct nvme_queue *next;
	uint64_t key;
	uint32_t references;
};

/* The queue pair of @setup, made at the first call; one reference is the caller's. NULL and errno. */
struct nvme_queue *nvme_queue_get(struct reactor *reactor, const struct nvme_queue_setup *setup);
/* The last one frees it; nothing may be in flight. */
void nvme_queue_put(struct nvme_queue *queue);

/* A free slot, which nvme_queue_submit() takes; NULL while there is none or the queue does not run. */
static inline struct nvme_slot *nvme_queue_slot(struct nvme_queue *queue)
{
	return queue->state == NVME_RUNNING ? queue->free : NULL;
}

/* Its page for entries that do not fit into the command, and nothing more. */
static inline struct nvme_list nvme_slot_list(const struct nvme_queue *queue, const struct nvme_slot *slot)
{
	uint64_t at = queue->layout.lists + (uint64_t)slot->cid * NVME_PAGE_SIZE;

	return (struct nvme_list){.page = queue->memory + at, .iova = queue->iova + at};
}

static inline uint8_t *nvme_bounce(const struct nvme_queue *queue, uint16_t index)
{
	return queue->memory + queue->layout.bounce + (uint64_t)index * NVME_BOUNCE_SIZE;
}

static inline uint64_t nvme_bounce_iova(const struct nvme_queue *queue, uint16_t index)
{
	return queue->iova + queue->layout.bounce + (uint64_t)index * NVME_BOUNCE_SIZE;
}

/* The entry that nvme_queue_push() submits. */
static inline struct nvme_command *nvme_queue_entry(const struct nvme_queue *queue)
{
	return &queue->submission[queue->tail];
}

/* Submit what stands there; the doorbell is rung at the end of the turn, once for all of them. */
static inline void nvme_queue_push(struct nvme_queue *queue, const struct nvme_slot *slot)
{
	uint32_t tail = queue->tail + 1;

	queue->tail = tail == queue->depth ? 0 : tail;
	queue->watch->started[slot->cid] = reactor_now(queue->reactor);
	if (!queue->ring.queued) {
		reactor_defer(queue->reactor, &queue->ring);
	}
}

static inline void nvme_queue_take(struct nvme_queue *queue, const struct nvme_slot *slot)
{
	queue->free = slot->next;
	queue->free_count--;
}

/* Submit slot->command. */
void nvme_queue_submit(struct nvme_queue *queue, struct nvme_slot *slot);
/* Put @io at the end of the line: nvme_request_go_on() is called when it may go on. */
void nvme_queue_wait(struct nvme_queue *queue, struct bdev_io *io);

/* For nvme_queue_life.c: set what is the same for all; and, once everything is in place, run. */
void nvme_queue_init(struct nvme_queue *queue);
void nvme_queue_begin(struct nvme_queue *queue);

/* What the requests' side (nvme_disk.c) does: a command, no plain one, has ended; its slot is free afterwards.
 */
void nvme_command_done(struct nvme_queue *queue, struct nvme_slot *slot, int status);
/* Write the command of a plain slot, which is in flight, once more. */
void nvme_command_again(const struct nvme_slot *slot, struct nvme_command *command);
/* Go on with a request that waited: false if it has to wait again. */
bool nvme_request_go_on(struct bdev_io *io);

#endif
