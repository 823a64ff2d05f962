/* Tasks that wait for what other processes do, and nobody tells them of: they look again every 50 us. */
#ifndef SCSI_WAIT_H
#define SCSI_WAIT_H

#include <stdbool.h>

#include "scsi/unit.h"

struct scsi_task;

void wait_init(struct scsi_unit *unit);
/* Go on with next(task) when is_over(task); at once, if it is. An aborted task ends instead. */
void wait_until(struct scsi_task *task, bool (*is_over)(struct scsi_task *task),
		void (*next)(struct scsi_task *task));

#endif
