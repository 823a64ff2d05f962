/*
 * What all ports of one logical unit have in common: reservations, unit attentions, mode parameters. It lives
 * in a memfd of the control process that every reactor serving the unit maps, so that it is the same for all of
 * them and outlives any of them.
 *
 * Changes are made under a lock that survives the death of its holder, on a copy of the state that one
 * store then makes the current one: whoever dies in the middle leaves the state as it was. Readers on the
 * data path take no lock: they compare one word, the generation, with the one they have last looked at.
 */
#ifndef SCSI_SHARED_H
#define SCSI_SHARED_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
#define SCSI_MAX_NEXUSES 256
#define SCSI_MAX_SEATS 256 /* processes that serve one unit */

/* Unit attention conditions, the most important (SPC-5, table of precedence) first. */
enum scsi_attention {
	SCSI_ATTENTION_POWER_ON,
	SCSI_ATTENTION_RESET,
	SCSI_ATTENTION_NEXUS_LOSS,
	SCSI_ATTENTION_COMMANDS_CLEARED,
	SCSI_ATTENTION_REGISTRATIONS_PREEMPTED,
	SCSI_ATTENTION_RESERVATIONS_PREEMPTED,
	SCSI_ATTENTION_RESERVATIONS_RELEASED,
	SCSI_ATTENTION_LUNS_CHANGED,
	SCSI_ATTENTION_CAPACITY_CHANGED,
	SCSI_ATTENTION_MODE_CHANGED,
	SCSI_ATTENTIONS,
};

/* A persistent registration, to be kept on disk (APTPL) or shown to an operator. */
struct scsi_registration {
	uint64_t initiator; /* SAS addresses of the ports */
	uint64_t target;
	uint64_t key;
	uint16_t port; /* relative target port identifier */
	bool holder;
	uint8_t type; /* of the reservation, where it is the holder's */
};

enum scsi_sanitize_state {
	SCSI_SANITIZE_NONE,
	SCSI_SANITIZE_RUNNING,
	SCSI_SANITIZE_FAILED,
};

#define SCSI_SANITIZE_PATTERN 4096

/* What a SANITIZE has to do, which the control process sees to. */
struct scsi_sanitize {
	bool erase;	   /* BLOCK ERASE; else OVERWRITE, */
	bool invert;	   /* with the pattern inverted from pass to pass */
	bool unrestricted; /* AUSE: a failure can be left */
	uint8_t passes;
	uint32_t length; /* of the pattern */
	uint8_t pattern[SCSI_SANITIZE_PATTERN];
};

struct scsi_shared;

/* What stands in a file so that it survives a restart (APTPL). */
struct scsi_snapshot {
	uint32_t number; /* of the last change that it has in it: see scsi_shared_kept() */
	uint32_t count;	 /* of registrations */
	bool aptpl;	 /* false: nothing is to be kept */
};

uint64_t scsi_shared_size(void);
/* Make @fd, an empty memfd, the state of a new logical unit. 0 or -errno. */
int scsi_shared_init(int fd);
/* Map it; @fd stays the caller's. NULL and errno: EPROTO when it is something else. */
struct scsi_shared *scsi_shared_map(int fd);
void scsi_shared_unmap(struct scsi_shared *shared);
/* Establish a unit attention condition for every nexus, or for all but one (-1: none is spared). */
void scsi_shared_attention(struct scsi_shared *shared, enum scsi_attention attention, int except);
/* A LOGICAL UNIT RESET: what SAM-6 section 6.3.3 has it undo. The nexus @by learns it as well. */
void scsi_shared_reset(struct scsi_shared *shared);
/*
 * An initiator has gone, or comes anew (@attention): what it held through @target and cannot keep without a
 * nexus is released. Persistent reservations stay.
 */
void scsi_shared_nexus_lost(struct scsi_shared *shared, uint64_t initiator, uint64_t target,
			    enum scsi_attention attention);
/* The same of one that has gone for good; its nexus is forgotten once it has no registration. */
void scsi_shared_nexus_gone(struct scsi_shared *shared, uint64_t initiator, uint64_t target);
/* The number of a nexus that the unit knows, or -ENOENT. */
int scsi_shared_nexus(struct scsi_shared *shared, uint64_t initiator, uint64_t target);
/* How many nexuses the unit knows. */
uint32_t scsi_shared_nexuses(struct scsi_shared *shared);
/* A process that takes a seat has nothing in flight, whatever the one before it has left. */
void scsi_shared_sit(struct scsi_shared *shared, uint32_t seat);
/* The persistent registrations as they are now, SCSI_MAX_NEXUSES at most. */
void scsi_shared_registrations(struct scsi_shared *shared, struct scsi_registration *out,
			       struct scsi_snapshot *snapshot);
/* Change @number is on disk, and all before it; or (@failed) it could not be written. */
void scsi_shared_kept(struct scsi_shared *shared, uint32_t number, bool failed);
/* What has come of the last SANITIZE, and what it was to do. */
enum scsi_sanitize_state scsi_shared_sanitize(struct scsi_shared *shared, struct scsi_sanitize *out);
/* One that is under way stands in a file, where it can: it goes on after a restart. */
void scsi_shared_sanitize_noted(struct scsi_shared *shared);
/* After a restart: one was under way, or had failed. */
void scsi_shared_sanitize_restore(struct scsi_shared *shared, const struct scsi_sanitize *what, bool failed);
/* Is no command in flight, in whatever process, that changes the medium? */
bool scsi_shared_is_idle(struct scsi_shared *shared);
/* It has come so far, of 65536. */
void scsi_shared_sanitize_progress(struct scsi_shared *shared, uint32_t progress);
/* It has ended. */
void scsi_shared_sanitized(struct scsi_shared *shared, bool failed);
/* Bring registrations back after a restart; PRGENERATION begins anew. 0, -ENOSPC, -EINVAL (no such type). */
int scsi_shared_restore(struct scsi_shared *shared, const struct scsi_registration *items, uint32_t count);
/* cffi: end */

#define SCSI_NO_NEXUS UINT32_MAX

enum scsi_copy_status {
	COPY_NONE,
	COPY_UNDER_WAY, /* from here on as RECEIVE COPY STATUS has it, plus one */
	COPY_DONE,
	COPY_FAILED,
};

/* What RECEIVE COPY RESULTS tells of the last EXTENDED COPY of a nexus. */
struct scsi_copy_result {
	uint8_t list; /* identifier */
	uint8_t status;
	uint8_t sense_length;
	uint16_t segments; /* that were carried out */
	uint64_t moved;	   /* bytes */
	uint8_t sense[36];
};

/* Reservation types, SPC-5 section 6.16.3.4. */
enum pr_type {
	PR_NONE = 0,
	PR_WRITE_EXCLUSIVE = 1,
	PR_EXCLUSIVE_ACCESS = 3,
	PR_WRITE_EXCLUSIVE_REGISTRANTS = 5,
	PR_EXCLUSIVE_ACCESS_REGISTRANTS = 6,
	PR_WRITE_EXCLUSIVE_ALL = 7,
	PR_EXCLUSIVE_ACCESS_ALL = 8,
};

/* The last PERSISTENT RESERVE OUT of a nexus that has changed something. */
struct scsi_pr_done {
	uint64_t tag;
	uint64_t key;
	uint64_t action_key;
	uint8_t action;
	bool valid;
};

/* An I_T nexus that the unit has heard of. */
struct scsi_nexus {
	uint64_t initiator;
	uint64_t target;
	uint64_t key;  /* registered if not zero */
	uint16_t port; /* relative target port identifier */
	bool used;
	bool present; /* somebody is there; else only the registration is kept */
	bool prevents_removal;
	bool aca; /* an auto contingent allegiance condition: SAM-6 section 5.10 */
	struct scsi_pr_done done;
};

struct scsi_state {
	uint32_t pr_generation;
	uint32_t pr_holder;   /* nexus, or SCSI_NO_NEXUS; for the types "all registrants" one of them */
	uint32_t reserved_by; /* RESERVE: nexus, or SCSI_NO_NEXUS */
	uint8_t pr_type;
	uint8_t sanitize; /* enum scsi_sanitize_state */
	bool aptpl;
	bool write_cache;      /* WCE */
	bool descriptor_sense; /* D_SENSE */
	bool write_protect;    /* SWP */
	bool stopped;	       /* by START STOP UNIT */
	struct scsi_nexus nexus[SCSI_MAX_NEXUSES];
};

/* How many commands of each nexus that change the medium are in flight in one process: fence.h. */
struct scsi_seat {
	_Alignas(64) _Atomic uint32_t changing[SCSI_MAX_NEXUSES];
};

struct scsi_shared {
	uint64_t magic;
	_Atomic uint32_t generation; /* moves with anything that the data path must know */
	_Atomic uint32_t current;    /* which of states[] */
	pthread_mutex_t lock;
	struct scsi_state states[2];
	_Atomic uint32_t attentions[SCSI_MAX_NEXUSES]; /* 1 << enum scsi_attention */
	_Atomic uint32_t seats_used;		       /* seats from this one on were never taken */
	struct scsi_seat seats[SCSI_MAX_SEATS];
	/* Changes of persistent reservations that were to be on disk, and how far they are: keep.h. */
	_Atomic uint32_t sanitize_progress;
	_Atomic bool sanitize_noted;   /* IMMED: answered once it is */
	struct scsi_sanitize sanitize; /* with the lock, while none is running */
	_Atomic uint32_t keep_asked;
	_Atomic uint32_t keep_done;
	_Atomic uint32_t keep_failed; /* the last one that could not be written; 0: none since */
	struct scsi_copy_result copies[SCSI_MAX_NEXUSES]; /* with the lock */
};

static inline const struct scsi_state *shared_state(const struct scsi_shared *shared)
{
	return &shared->states[atomic_load_explicit(&shared->current, memory_order_acquire) & 1];
}

void shared_lock(struct scsi_shared *shared);
void shared_unlock(struct scsi_shared *shared);
/* With the lock: a copy of the state to change, and to make current by shared_commit(). */
struct scsi_state *shared_edit(struct scsi_shared *shared);
void shared_commit(struct scsi_shared *shared);

/* With the lock, and a state to change: the nexus of two ports, or -ENOENT; a new one, or -ENOSPC. */
int nexus_find(const struct scsi_state *state, uint64_t initiator, uint64_t target);
int nexus_add(struct scsi_state *state, uint64_t initiator, uint64_t target, uint16_t port);
/* Take a registration away; a nexus that is nothing else is forgotten. */
void nexus_unregister(struct scsi_state *state, uint32_t nexus);

/* Find the nexus of two ports, or make it known, with a POWER ON condition. -ENOSPC: the table is full. */
int shared_attach(struct scsi_shared *shared, uint64_t initiator, uint64_t target, uint16_t port);
/* Establish or clear an auto contingent allegiance condition of a nexus. */
void shared_set_aca(struct scsi_shared *shared, uint32_t nexus, bool aca);
/* Release what a nexus holds, which is told; its commands may still be in flight. */
void shared_nexus_reset(struct scsi_shared *shared, uint32_t nexus);
void shared_attend(struct scsi_shared *shared, uint32_t nexus, enum scsi_attention attention);

#endif
