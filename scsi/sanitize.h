/* SANITIZE: SBC-4 sections 4.11 and 5.27. */
#ifndef SCSI_SANITIZE_H
#define SCSI_SANITIZE_H

#include <stdbool.h>

struct scsi_task;
struct scsi_unit;
struct sense;

/* A command meets a unit that is being sanitized, or could not be: true if it goes on, or the task has ended.
 */
bool sanitize_passes(struct scsi_task *task);
/* What REQUEST SENSE tells meanwhile. */
void sanitize_sense(const struct scsi_unit *unit, struct sense *sense);

#endif
