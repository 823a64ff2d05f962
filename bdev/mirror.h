/*
 * A block device whose contents are on each of several legs.
 *
 * What all reactors have to agree on is in memory that they share with the control process: which legs there
 * are, and of every region of the disk whether writes to it may be under way, and whether the legs may differ
 * there.
 */
#ifndef BDEV_MIRROR_H
#define BDEV_MIRROR_H

#include "bdev/bdev.h"
#include "bdev/bitmap.h"

/* cffi: begin */
#define MIRROR_LEGS 16
#define MIRROR_VERSION 1

enum mirror_state {
	MIRROR_MISSING,
	MIRROR_ACTIVE,	   /* has all data, but where SUSPECT */
	MIRROR_REBUILDING, /* is written, and never read */
};

/* The first block of every leg: little-endian. */
struct mirror_super {
	char magic[8];
	uint32_t checksum; /* CRC-32 of all that follows, with reserved */
	uint32_t version;
	uint8_t uuid[16];     /* of the mirror */
	uint64_t events;      /* grows with every change of what stands here */
	uint64_t num_blocks;  /* of the mirror */
	uint64_t region_size; /* bytes, a power of two */
	uint64_t data_offset; /* bytes, on the leg */
	uint64_t log_offset;  /* bytes, on the leg: blocks of struct bitmap_block */
	uint32_t block_size;
	uint32_t legs;	/* that it is made for */
	uint32_t place; /* of this leg */
	uint32_t reserved;
	struct {
		uint8_t uuid[16]; /* new with every rebuild */
		uint32_t state;	  /* enum mirror_state */
	} member[16];
};

enum mirror_region {
	MIRROR_DIRTY = 0x01,   /* its bit is set in the logs of all legs: writes may go there */
	MIRROR_WANTED = 0x02,  /* somebody waits for that */
	MIRROR_USED = 0x04,    /* written since the last look */
	MIRROR_FRESH = 0x08,   /* written before the last look, but after the one before */
	MIRROR_SUSPECT = 0x10, /* active legs may differ: read from the first one only */
	MIRROR_STALE = 0x20,   /* rebuilding legs may lack it */
	MIRROR_LOCKED = 0x40,  /* is being copied from leg to leg: no new writes */
};

struct mirror_shared {
	struct mirror_super super; /* as of the last assembly */
	uint64_t regions;
	uint64_t blocks;			/* of the log */
	uint64_t owners;			/* reactors */
	uint64_t legs;				/* 1 << place: active; 1 << (place + MIRROR_LEGS): rebuilding */
	uint64_t changed, written;		/* how often `legs` has, and which of these the legs know */
	uint32_t news;				/* the control process was told to have a look */
	uint16_t super_lock;			/* owner of the superblocks while they are written */
	uint16_t syncer;			/* owner of all regions that are LOCKED */
	uint64_t flags_at, locks_at, counts_at; /* bytes from the beginning */
};

struct mirror_setup {
	uint64_t block_count;
	uint32_t base_count;
	struct bdev **bases;
	const uint32_t *places; /* of the bases */
	uint16_t owner;		/* 1 to mirror_shared.owners, another one in every reactor */
	int shared_fd;		/* stays the caller's, and so does the next */
	int event_fd;		/* eventfd for news */
};

/* How many bytes a mirror takes in memory, and making one out of zeroes. */
uint64_t mirror_shared_size(const struct mirror_super *super, uint64_t owners);
void mirror_shared_init(struct mirror_shared *shared, const struct mirror_super *super, uint64_t owners);
/* The first region from @region on with one of these flags; the number of regions if there is none. */
uint64_t mirror_find(const struct mirror_shared *shared, uint64_t region, uint32_t flags);
uint64_t mirror_count(const struct mirror_shared *shared, uint32_t flags);
/* Set and clear flags of every region. */
void mirror_mark(struct mirror_shared *shared, uint32_t set, uint32_t clear);
/* Set flags of every region that has one of @where. */
void mirror_mark_where(struct mirror_shared *shared, uint32_t where, uint32_t set);
/* Take over a block of a leg's log: what is dirty there gets these flags, and DIRTY. */
void mirror_load(struct mirror_shared *shared, uint64_t index, const void *words, uint32_t flags);
enum mirror_state mirror_leg_state(const struct mirror_shared *shared, uint32_t place);
/*
 * Give a leg another state; then the superblocks are to be written. 0; -EBUSY if that would leave no active
 * one, -ENODEV if one that is not rebuilding is to be active.
 */
int mirror_leg_set(struct mirror_shared *shared, uint32_t place, enum mirror_state state);
/* @owner is dead: where it wrote is SUSPECT, what it held is free. */
void mirror_forsake(struct mirror_shared *shared, uint16_t owner);

/* NULL and errno on failure. */
struct bdev *mirror_bdev_open(struct reactor *reactor, uint64_t id, uint32_t slot,
			      const struct mirror_setup *setup);
/* Have a handle reach a leg, or no more. What is under way there goes on. */
void mirror_attach(struct bdev *bdev, uint32_t place, struct bdev *base);
void mirror_detach(struct bdev *bdev, uint32_t place);

enum mirror_job_kind {
	MIRROR_SETTLE,	  /* write the superblocks, if they have changed */
	MIRROR_WRITE_ALL, /* write the whole log, then the superblocks */
	MIRROR_FLUSH,	  /* make durable what was written to the legs */
	MIRROR_CLEAN, /* make durable what is not used any more, and clear its bits, if all legs are active */
};

/* All of these end in NOTICE_DRAINED from @id, with -errno as its code. 0; -EBUSY while another one runs. */
int mirror_job_start(struct bdev *bdev, uint64_t id, enum mirror_job_kind kind);
/* Make the legs the same in regions @first to @end - 1, where they are SUSPECT or STALE. */
int mirror_sync_start(struct bdev *bdev, uint64_t id, uint64_t first, uint64_t end);
/* cffi: end */

#endif
