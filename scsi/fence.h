/*
 * Waiting for what other initiators have begun: PREEMPT AND ABORT ends when no command that changes the
 * medium, of a nexus that it has preempted, is in flight any more, in whatever reactor.
 */
#ifndef SCSI_FENCE_H
#define SCSI_FENCE_H

#include "reactor/barrier.h"
#include "scsi/unit.h"

struct scsi_task;

#define FENCE_WORDS (SCSI_MAX_NEXUSES / 64)

/* A set of nexuses. */
struct fence_set {
	uint64_t words[FENCE_WORDS];
};

static inline void fence_set_add(struct fence_set *set, uint32_t nexus)
{
	set->words[nexus / 64] |= 1ull << nexus % 64;
}

/* The nexuses that a task is about to wait for: kept in the half of its buffer that its list is not in. */
struct fence_set *fence_set_of(const struct scsi_task *task);
/* Go on with @next when those in fence_set_of() have nothing in flight that began before now. */
void fence_wait(struct scsi_task *task, void (*next)(struct scsi_task *task));

/* A command that changes the medium begins; before it looks at reservations. */
static inline void fence_begin(struct scsi_unit *unit)
{
	uint32_t count = atomic_load_explicit(unit->changing, memory_order_relaxed);

	atomic_store_explicit(unit->changing, count + 1, memory_order_relaxed);
	barrier_here();
}

static inline void fence_end(struct scsi_unit *unit)
{
	uint32_t count = atomic_load_explicit(unit->changing, memory_order_relaxed);

	atomic_store_explicit(unit->changing, count - 1, memory_order_release);
}

#endif
