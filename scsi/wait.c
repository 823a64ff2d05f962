#include "scsi/wait.h"

#include <stddef.h>

#include "scsi/task.h"

#define RECHECK_NS 50000

static void go_on(struct scsi_task *task)
{
	if (task->aborted) {
		task_good(task);
	} else {
		task->next(task);
	}
}

static int look_later(struct scsi_unit *unit)
{
	uint64_t due = reactor_now(unit->reactor) + reactor_ns_to_ticks(RECHECK_NS);

	return timer_set(unit->reactor, &unit->wait_timer, due);
}

static void look(struct timer *timer)
{
	struct scsi_unit *unit = (struct scsi_unit *)((char *)timer - offsetof(struct scsi_unit, wait_timer));
	struct scsi_task **link = &unit->looking;
	struct scsi_task *over = NULL;

	while (*link != NULL) {
		struct scsi_task *task = *link;

		if (task->aborted || task->is_over(task)) {
			*link = task->link;
			task->link = over;
			over = task;
		} else {
			link = &task->link;
		}
	}
	/* A timer that has just fired has its place in the heap: setting it again needs no memory. */
	if (unit->looking != NULL) {
		look_later(unit);
	}
	while (over != NULL) {
		struct scsi_task *task = over;

		over = task->link;
		go_on(task);
	}
}

void wait_init(struct scsi_unit *unit)
{
	unit->wait_timer.fire = look;
}

void wait_until(struct scsi_task *task, bool (*is_over)(struct scsi_task *task),
		void (*next)(struct scsi_task *task))
{
	struct scsi_unit *unit = task->unit;

	task->is_over = is_over;
	task->next = next;
	if (is_over(task)) {
		go_on(task);
		return;
	}
	task->link = unit->looking;
	unit->looking = task;
	if (look_later(unit) < 0) {
		unit->looking = task->link;
		task_status(task, SCSI_BUSY); /* without memory for a timer nobody would ever look again */
	}
}
