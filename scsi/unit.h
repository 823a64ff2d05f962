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

/* How a process joins a unit: what the control process gives it. */
struct scsi_place {
	struct scsi_shared *shared;
	uint32_t seat; /* of its own, less than SCSI_MAX_SEATS */
	int news;      /* eventfd: there is something for the control process to do; -1: nobody would */
	bool keeps;    /* reservations on disk */
};

struct scsi_unit;
struct scsi_target;

struct scsi_target *scsi_target_create(const struct scsi_ports *ports);
/* Free a target, and its units; nothing may be in flight. */
void scsi_target_free(struct scsi_target *target);
/*
 * Let @target have @bdev at @lun. What @place names must outlive the unit. 0, -EEXIST, -EINVAL (no such LUN or
 * seat), -ENOSPC (the unit knows too many nexuses), -ENOMEM.
 */
int scsi_target_add(struct scsi_target *target, uint32_t lun, struct bdev *bdev, const struct scsi_place *place,
		    const struct scsi_identity *identity);
/* Commands that come from now on find no unit; 0, -ENOENT, -EBUSY (tasks are in flight: try again). */
int scsi_target_remove(struct scsi_target *target, uint32_t lun);
/* The unit's bdev is going: commands fail from now on as if there were no unit. 0, -ENOENT. */
int scsi_target_detach(struct scsi_target *target, uint32_t lun);
uint32_t scsi_target_in_flight(const struct scsi_target *target);
/* CLEAR ACA at @lun. */
void scsi_target_clear_aca(struct scsi_target *target, uint32_t lun);
/* An I_T NEXUS RESET: what SAM-6 section 6.3.4 has it undo, at all units. */
void scsi_target_nexus_reset(struct scsi_target *target);
/* Establish a unit attention condition for this nexus at @lun, or at all units (-1). */
void scsi_target_attention(struct scsi_target *target, int lun, enum scsi_attention attention);
/* cffi: end */

/* What a command needs to be let through by reservations; each allows more than the one before. */
enum scsi_access {
	ACCESS_NONE,   /* no command does without it: what is left is nothing */
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
	enum scsi_access allowed;  /* now; */
	enum scsi_access reserved; /* by reservations alone */
	uint8_t sanitize;	   /* enum scsi_sanitize_state */
	bool aca;		   /* only commands with that attribute are let through */
	bool write_cache;
	bool write_protect;
	bool stopped;
	bool ordered;	/* an ORDERED task is running */
	bool releasing; /* inside release() */
	uint32_t in_flight;
	uint32_t held; /* by EXTENDED COPY of other units' */
	uint32_t lun;
	struct scsi_task *waiting; /* for an ORDERED one, or being it; oldest first */
	uint32_t waiting_count;	   /* of those in flight */
	struct scsi_task **waiting_tail;
	_Atomic uint32_t *changing; /* tasks that change the medium, in flight: shared */
	struct scsi_task *looking;  /* wait for what other processes do: wait.h */
	struct timer wait_timer;
	int news; /* see struct scsi_place */
	bool keeps;
	struct scsi_identity identity;
};

struct scsi_target {
	struct scsi_ports ports;
	/*
	 * The transport's: have all commands aborted of the nexuses in fence_set_of(), wherever they are
	 * served; task->next follows. NULL: it has no way to.
	 */
	void (*abort_others)(struct scsi_task *task);
	/* The transport's: all targets of the same initiator, some NULL; EXTENDED COPY reaches their units. */
	struct scsi_target *const *peers;
	uint32_t peer_count;
	struct scsi_unit *units[SCSI_MAX_UNITS];
};

/* Look at the shared state again. Returns the conditions that wait for this nexus, 1 << enum scsi_attention. */
uint32_t unit_refresh(struct scsi_unit *unit);
/* Take the most important condition that waits: its additional sense code, or 0. */
uint16_t unit_take_attention(struct scsi_unit *unit);
/* Is it what a designator says, from its code set on (SPC-5 section 7.7.6.1)? */
bool unit_is_called(const struct scsi_unit *unit, const uint8_t *designator);
/* Have the control process look at what is to be done. */
void unit_tell_news(const struct scsi_unit *unit);
void unit_clear_attention(struct scsi_unit *unit, enum scsi_attention attention);
/* What another port's RESERVE or persistent reservation leaves this nexus. */
enum scsi_access unit_allowed(const struct scsi_state *state, uint32_t nexus);

static inline uint32_t unit_block_size(const struct scsi_unit *unit)
{
	return unit->bdev->block_size;
}

static inline uint64_t unit_blocks(const struct scsi_unit *unit)
{
	return unit->bdev->size >>
	       __builtin_ctz(unit->bdev->block_size); /* a division takes ten times as long */
}

#endif
