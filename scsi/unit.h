/*
 * Logical units as one I_T nexus reaches them: a target is a port with up to 256 units, and belongs to one
 * session (one initiator port). A unit joins a bdev of this process with the state that it shares with
 * every other port of the same bdev.
 */
#ifndef SCSI_UNIT_H
#define SCSI_UNIT_H

#include "bdev/bdev.h"
#include "scsi/shared.h"

/* cffi: begin */
#define SCSI_MAX_UNITS 256 /* of one target: flat space addressing from 0 to 255 */

/* What INQUIRY tells of a unit. Texts are ASCII, padded with spaces. */
struct scsi_identity {
	char vendor[8];
	char product[16];
	char revision[4];
	char serial[32];
	uint8_t uuid[16]; /* of the bdev: the same through whatever port it is seen */
	bool readonly;
	bool rotational;
};

struct scsi_ports {
	uint64_t initiator; /* SAS addresses, unique among those that share a unit */
	uint64_t target;
	uint16_t relative; /* identifier of the target port, from 1 */
};

struct scsi_unit;
struct scsi_target;

struct scsi_target *scsi_target_create(const struct scsi_ports *ports);
/* Free a target, and its units; nothing may be in flight. */
void scsi_target_free(struct scsi_target *target);
/*
 * Let @target have @bdev at @lun. @shared must outlive the unit. 0, -EEXIST, -EINVAL (no such LUN), -ENOSPC
 * (the unit knows too many nexuses), -ENOMEM.
 */
int scsi_target_add(struct scsi_target *target, uint32_t lun, struct bdev *bdev, struct scsi_shared *shared,
		    const struct scsi_identity *identity);
/* Commands that come from now on find no unit; 0, -ENOENT, -EBUSY (tasks are in flight: try again). */
int scsi_target_remove(struct scsi_target *target, uint32_t lun);
/* The unit's bdev is going: commands fail from now on as if there were no unit. 0, -ENOENT. */
int scsi_target_detach(struct scsi_target *target, uint32_t lun);
uint32_t scsi_target_in_flight(const struct scsi_target *target);
/* Establish a unit attention condition for this nexus at @lun, or at all units (-1). */
void scsi_target_attention(struct scsi_target *target, int lun, enum scsi_attention attention);
/* cffi: end */

/* What a command needs to be let through by reservations; each allows more than the one before. */
enum scsi_access {
	ACCESS_ANY,    /* whatever is reserved */
	ACCESS_PROBE,  /* all but RESERVE by another (SPC-2) */
	ACCESS_READ,   /* reads the medium */
	ACCESS_CHANGE, /* all else */
};

struct scsi_task;

struct scsi_unit {
	struct bdev *bdev; /* NULL once it was removed */
	struct scsi_shared *shared;
	struct scsi_target *target;
	struct reactor *reactor;
	uint32_t nexus;
	/* What shared->generation was when the following were taken from it; 0: look again. */
	uint32_t generation;
	enum scsi_access allowed;
	bool write_cache;
	bool write_protect;
	bool stopped;
	bool ordered;	  /* an ORDERED task is running */
	bool releasing;	  /* inside release() */
	uint32_t running; /* in flight and not waiting for an ORDERED task */
	uint32_t in_flight;
	uint32_t lun;
	struct scsi_task *waiting; /* for an ORDERED one, or being it; oldest first */
	struct scsi_task **waiting_tail;
	uint32_t changing;	   /* tasks that change the medium, in flight */
	struct scsi_task *fencing; /* wait for other nexuses' */
	struct timer fence_timer;
	struct scsi_identity identity;
};

struct scsi_target {
	struct scsi_ports ports;
	uint32_t in_flight;
	struct scsi_unit *units[SCSI_MAX_UNITS];
};

/* Look at the shared state again. Returns the conditions that wait for this nexus, 1 << enum scsi_attention. */
uint32_t unit_refresh(struct scsi_unit *unit);
/* Take the most important condition that waits: its additional sense code, or 0. */
uint16_t unit_take_attention(struct scsi_unit *unit);
void unit_clear_attention(struct scsi_unit *unit, enum scsi_attention attention);
/* What another port's RESERVE or persistent reservation leaves this nexus. */
enum scsi_access unit_allowed(const struct scsi_state *state, uint32_t nexus);

static inline uint32_t unit_block_size(const struct scsi_unit *unit)
{
	return unit->bdev->block_size;
}

static inline uint64_t unit_blocks(const struct scsi_unit *unit)
{
	return unit->bdev->size / unit->bdev->block_size;
}

#endif
