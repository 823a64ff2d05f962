/*
 * Each reactor shows, for each of its nexuses, how many commands that change the medium are in flight. A
 * command counts itself first and looks at the reservation after; who preempts changes the reservation first
 * and looks at the counts after. Between the two steps each side needs a full barrier, or both could miss the
 * other: the side that is rare makes both, so that the data path has none (reactor/barrier.h).
 */
#include "scsi/fence.h"

#include "reactor/barrier.h"
#include "scsi/task.h"

#define RECHECK_NS 50000

_Static_assert(sizeof(struct fence_set) <= SCSI_BUFFER_SIZE / 2, "it is kept in a task's buffer");

/* What a waiting task waits for, in the half of its buffer that its parameter list is not in. */
static struct fence_set *set_of(const struct scsi_task *task)
{
	return (struct fence_set *)(void *)(task->buffer + SCSI_BUFFER_SIZE / 2);
}

static bool is_quiet(struct scsi_task *task)
{
	struct fence_set *set = set_of(task);
	uint64_t left = 0;

	for (uint32_t i = 0; i < SCSI_MAX_NEXUSES; i++) {
		uint64_t bit = 1ull << i % 64;

		if (set->words[i / 64] & bit &&
		    atomic_load_explicit(&task->unit->shared->changing[i].count, memory_order_acquire) == 0) {
			set->words[i / 64] &= ~bit;
		}
		left |= set->words[i / 64];
	}
	return left == 0;
}

static void look(struct timer *timer)
{
	struct scsi_unit *unit = (struct scsi_unit *)((char *)timer - offsetof(struct scsi_unit, fence_timer));
	struct scsi_task **link = &unit->fencing;
	struct scsi_task *quiet = NULL;

	while (*link != NULL) {
		struct scsi_task *task = *link;

		if (task->aborted || is_quiet(task)) {
			*link = task->link;
			task->link = quiet;
			quiet = task;
		} else {
			link = &task->link;
		}
	}
	if (unit->fencing != NULL) {
		timer_set(unit->reactor, timer, reactor_now(unit->reactor) + reactor_ns_to_ticks(RECHECK_NS));
	}
	while (quiet != NULL) {
		struct scsi_task *task = quiet;

		quiet = task->link;
		task_good(task);
	}
}

void fence_init(struct scsi_unit *unit)
{
	unit->fence_timer.fire = look;
	atomic_store(&unit->shared->changing[unit->nexus].count, 0);
}

void fence_wait(struct scsi_task *task, const struct fence_set *set)
{
	struct scsi_unit *unit = task->unit;
	uint64_t due = reactor_now(unit->reactor) + reactor_ns_to_ticks(RECHECK_NS);

	barrier_everywhere();
	*set_of(task) = *set;
	task->buffer_used = true;
	task->link = unit->fencing;
	unit->fencing = task;
	if (timer_set(unit->reactor, &unit->fence_timer, due) < 0) {
		unit->fencing = task->link;
		task_status(task, SCSI_BUSY); /* preempted already; asked again, nothing is left to abort */
	}
}
