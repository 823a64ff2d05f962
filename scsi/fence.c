/*
 * Each reactor shows, for each of its nexuses, how many commands that change the medium are in flight. A
 * command counts itself first and looks at the reservation after; who preempts changes the reservation first
 * and looks at the counts after. Either sees the other, as there is a barrier between the two steps of each,
 * which the side that is rare pays for (reactor/barrier.h).
 */
#include "scsi/fence.h"

#include "scsi/task.h"
#include "scsi/wait.h"

_Static_assert(sizeof(struct fence_set) <= SCSI_BUFFER_SIZE / 2, "it is kept in a task's buffer");

struct fence_set *fence_set_of(const struct scsi_task *task)
{
	return (struct fence_set *)(void *)(task->buffer + SCSI_BUFFER_SIZE / 2);
}

/* Has the nexus nothing in flight, in whatever process? */
static bool is_idle(const struct scsi_shared *shared, uint32_t nexus)
{
	uint32_t seats = atomic_load(&shared->seats_used);

	for (uint32_t i = 0; i < seats; i++) {
		if (atomic_load_explicit(&shared->seats[i].changing[nexus], memory_order_acquire) != 0) {
			return false;
		}
	}
	return true;
}

/* Each nexus counts once it was idle: what it begins later is not waited for. */
static bool is_quiet(struct scsi_task *task)
{
	struct fence_set *set = fence_set_of(task);
	uint64_t left = 0;

	for (uint32_t i = 0; i < SCSI_MAX_NEXUSES; i++) {
		uint64_t bit = 1ull << i % 64;

		if (set->words[i / 64] & bit && is_idle(task->unit->shared, i)) {
			set->words[i / 64] &= ~bit;
		}
		left |= set->words[i / 64];
	}
	return left == 0;
}

void fence_wait(struct scsi_task *task, void (*next)(struct scsi_task *task))
{
	barrier_everywhere();
	wait_until(task, is_quiet, next);
}
