/* What one command may ask for at most, and VPD page B0h says so. */
#ifndef SCSI_LIMITS_H
#define SCSI_LIMITS_H

#include "bdev/bdev.h"
#include "scsi/unit.h"

#define SCSI_ATOMIC_BYTES BDEV_ATOMIC_BYTES /* COMPARE AND WRITE and ORWRITE */
#define SCSI_MAX_UNMAP_BLOCKS 0x100000u
#define SCSI_MAX_UNMAP_RANGES 256u
#define SCSI_MAX_SAME_BLOCKS 0x7fffffu
#define SCSI_PORT_GROUP 1 /* every target port is in one group */

/* Contents in memory: there is no loss of power that they survive in part. */
static inline bool unit_writes_atomically(const struct scsi_unit *unit)
{
	return unit->bdev->memory != NULL;
}

static inline bool unit_can_unmap(const struct scsi_unit *unit)
{
	return (unit->bdev->supported & 1u << BDEV_UNMAP) != 0 && !unit->identity.readonly;
}

#endif
