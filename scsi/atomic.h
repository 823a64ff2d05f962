/* Commands that read, modify and write as one: at most one of them at a time on a unit, on any reactor. */
#ifndef SCSI_ATOMIC_H
#define SCSI_ATOMIC_H

#include "scsi/unit.h"

struct scsi_task;

void atomic_init_queue(struct scsi_unit *unit);
/* A task that holds the lock (task->atomic) has ended, in whatever way. */
void atomic_end(struct scsi_task *task);

#endif
