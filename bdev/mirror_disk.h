/*
 * What the parts of a mirror have in common: requests (mirror.c), its log and superblocks (mirror_log.c),
 * making legs the same (mirror_sync.c), the shared memory (mirror_shared.c).
 *
 * Writing, and why legs never differ silently:
 *
 *	count the write in the region
 *	-> the region is DIRTY, or made so: its bit is set in the log of every leg, durably
 *	-> write to all legs -> take it from the count -> answer
 *
 * A bit is cleared long after: when nothing has been written to the region for a while, and what was is
 * durable. So after a crash every place where legs may differ has its bit set in the log of each active
 * leg. The counts are each reactor's own, in shared memory: they say what a reactor that died was writing.
 *
 * No bit is cleared while a leg is missing or being rebuilt: it lacks nothing but what was written to
 * regions whose bits are set, so no more has to be copied when it comes back. A leg that fails after the
 * flush before clearing has what is cleared.
 *
 * A leg that fails is dropped for all reactors by one word, `legs`, and no write that it lacks is answered
 * before the superblocks of the others say so: otherwise it could be taken for current after a crash.
 *
 * Copying a region from leg to leg keeps writes out: LOCKED is set first, then the counts are waited for;
 * writers count themselves first, then look for LOCKED, and step back. Both are sequentially consistent, so
 * one of the two always sees the other. The same holds for clearing a bit.
 */
#ifndef BDEV_MIRROR_DISK_H
#define BDEV_MIRROR_DISK_H

#include "bdev/mirror.h"
#include "bdev/stacked.h"

#define MIRROR_BIT(place) (1ULL << (place))
#define MIRROR_ALL_ACTIVE (MIRROR_BIT(MIRROR_LEGS) - 1)
#define MIRROR_WINDOW 4096 /* regions that a request enters at a time */

enum mirror_phase {
	MIRROR_ENTER, /* into the regions of the window */
	MIRROR_SEND,
	MIRROR_ANSWER,
};

/* How far a request has come; it stands in io->scratch. */
struct mirror_progress {
	int32_t status;
	uint32_t window; /* how many are behind it */
	uint16_t todo;	 /* legs to be written yet, 1 << place */
	uint16_t sent, failed;
	uint8_t pending; /* requests on legs, and 1 while more are made */
	uint8_t phase;	 /* enum mirror_phase */
};

_Static_assert(sizeof(struct mirror_progress) <= sizeof(((struct bdev_io *)0)->scratch), "progress fits");

struct mirror_bdev;

struct mirror_list {
	struct bdev_io *first, **end;
};

/* One block on its way to every leg. */
struct mirror_meta {
	struct bdev_io io[MIRROR_LEGS];
	struct iovec iov[MIRROR_LEGS];
	uint8_t *image; /* a block for each leg */
	uint32_t pending;
	uint64_t ok, failed;
	void (*done)(struct mirror_bdev *mirror, int status);
};

struct mirror_job {
	uint64_t id;
	uint64_t block; /* of the log, next */
	enum mirror_job_kind kind;
	bool active;
	bool flushed;
};

struct mirror_sync {
	uint64_t id;
	uint64_t region, end;
	uint64_t position; /* bytes of the disk */
	uint64_t length;
	uint32_t target;
	bool active, locked, comparing;
	int status;
	struct bdev_io io;
	struct iovec iov;
	uint8_t *source, *compared;
	struct timer timer;
	struct deferred work;
};

struct mirror_bdev {
	struct stacked stacked;
	struct mirror_shared *shared;
	size_t shared_size;
	uint32_t *counts; /* ours */
	uint16_t owner;
	int event_fd;
	unsigned region_shift;
	struct bdev *legs[MIRROR_LEGS];
	uint32_t turn; /* of equal legs, whose it is to read */

	struct mirror_list contended; /* regions that are LOCKED */
	struct mirror_list logging;   /* wait for bits */
	struct mirror_list answering; /* wait for the superblocks */
	struct timer retry;
	struct deferred work;
	struct mirror_meta meta;
	bool writing; /* meta is in use */
	bool busy;    /* starting something */
	uint64_t block, generation;
	struct mirror_job job;
	struct mirror_sync sync;
};

static inline uint8_t *mirror_flag_at(const struct mirror_shared *shared, uint64_t region)
{
	return (uint8_t *)shared + shared->flags_at + region;
}

static inline uint8_t mirror_flags(const struct mirror_shared *shared, uint64_t region)
{
	return __atomic_load_n(mirror_flag_at(shared, region), __ATOMIC_SEQ_CST);
}

static inline void mirror_set(struct mirror_shared *shared, uint64_t region, uint32_t flags)
{
	__atomic_fetch_or(mirror_flag_at(shared, region), (uint8_t)flags, __ATOMIC_SEQ_CST);
}

static inline void mirror_clear(struct mirror_shared *shared, uint64_t region, uint32_t flags)
{
	__atomic_fetch_and(mirror_flag_at(shared, region), (uint8_t)~flags, __ATOMIC_SEQ_CST);
}

static inline uint16_t *mirror_lock(struct mirror_shared *shared, uint64_t block)
{
	return (uint16_t *)((uint8_t *)shared + shared->locks_at) + block;
}

static inline uint64_t mirror_legs(const struct mirror_shared *shared)
{
	return __atomic_load_n(&shared->legs, __ATOMIC_SEQ_CST);
}

static inline uint64_t mirror_active(const struct mirror_shared *shared)
{
	return mirror_legs(shared) & MIRROR_ALL_ACTIVE;
}

/* Are all legs active that the mirror is made for? */
static inline bool mirror_is_whole(const struct mirror_shared *shared)
{
	return mirror_active(shared) == MIRROR_BIT(shared->super.legs) - 1;
}

/* Legs that are written: active and rebuilding. */
static inline uint64_t mirror_written(const struct mirror_shared *shared)
{
	uint64_t legs = mirror_legs(shared);

	return (legs | legs >> MIRROR_LEGS) & MIRROR_ALL_ACTIVE;
}

static inline struct mirror_progress *mirror_progress_of(const struct bdev_io *io)
{
	return (struct mirror_progress *)io->scratch;
}

/* In mirror_shared.c. One owner's counts of writes under way, by region; whether nobody writes to a region. */
uint32_t *mirror_counts(struct mirror_shared *shared, uint16_t owner);
bool mirror_is_quiet(struct mirror_shared *shared, uint64_t region);

/* In mirror.c. Go on with a request. */
void mirror_go_on(struct bdev *bdev, struct bdev_io *io);
/* The regions of the request's window: first, and the one after the last. */
void mirror_window(const struct mirror_bdev *mirror, const struct bdev_io *io, uint64_t *first, uint64_t *end);
/* A leg has failed: drop it, and tell the control process. False: it is the last one that is active. */
bool mirror_drop(struct mirror_bdev *mirror, uint32_t place);
/* Tell the control process to have a look. */
void mirror_tell(struct mirror_bdev *mirror);
/* The bits of the request's window are set: write. */
void mirror_send(struct mirror_bdev *mirror, struct bdev_io *io);
/* The request, which waits, cannot be carried out. */
void mirror_fail(struct mirror_bdev *mirror, struct bdev_io *io, int status);

void mirror_list_init(struct mirror_list *list);
void mirror_append(struct mirror_list *list, struct bdev_io *io);

/* In mirror_log.c. */
int mirror_log_init(struct mirror_bdev *mirror);
void mirror_log_free(struct mirror_bdev *mirror);
/* Have what waits looked at, at the end of this turn; or in a little while, for what others hold. */
void mirror_defer(struct mirror_bdev *mirror);
bool mirror_look_again(struct mirror_bdev *mirror); /* false: no memory */

/* In mirror_sync.c. */
int mirror_sync_init(struct mirror_bdev *mirror);
void mirror_sync_free(struct mirror_bdev *mirror);

#endif
