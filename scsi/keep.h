/* Persistent reservations on disk: what a reactor has to do with them. */
#ifndef SCSI_KEEP_H
#define SCSI_KEEP_H

#include <stdint.h>

#include "scsi/shared.h"

struct scsi_task;

/* With the lock: what was just changed is to be kept. Returns the change's number, never 0. */
uint32_t keep_ask(struct scsi_shared *shared);
/* End @task with status GOOD once change @number (0: none) is on disk, or with what went wrong. */
void keep_wait(struct scsi_task *task, uint32_t number);

#endif
