/*
 * The ranges of one device that are locked, in a memfd of the control process that every reactor with the
 * device open maps. It has no lock that is held over any input or output: a mutex, which survives its holder,
 * covers a few stores. A range belongs to an owner, which is a reactor; when that dies the control process
 * calls range_table_owner_gone(), after the fence: nothing of the owner can still happen then.
 *
 * A COMPARE_AND_WRITE whose comparison has succeeded puts what it is going to write into the table first: the
 * intent. Where its owner dies, the intent is an orphan, and whoever adopts it writes it again, whole.
 */
#ifndef BDEV_RANGE_TABLE_H
#define BDEV_RANGE_TABLE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "bdev/bdev.h"

/* cffi: begin */
#define RANGE_OWNERS 256 /* numbered from 0 */

struct range_table;

/* Make @fd, an empty memfd, a table with no range. 0 or -errno. */
int range_table_init(int fd);
/* Map it; @fd stays the caller's. NULL and errno: EPROTO when it is something else. */
struct range_table *range_table_map(int fd);
void range_table_unmap(struct range_table *table);
/*
 * A reactor has died, and nothing of it can still happen: its ranges are free, and its intents orphans. Returns
 * how many orphans there are.
 */
uint32_t range_table_owner_gone(struct range_table *table, uint32_t owner);
/* How many ranges are locked, or have an orphan. */
uint32_t range_table_used(const struct range_table *table);
/* cffi: end */

#define RANGE_ENTRIES 16
#define RANGE_DONE 64

enum range_state {
	RANGE_FREE,
	RANGE_LOCKED,
	RANGE_PENDING, /* locked, and with an intent */
	RANGE_ORPHAN,  /* an intent that nobody writes */
};

struct range_entry {
	uint32_t state; /* enum range_state; written last */
	uint32_t owner;
	uint64_t offset; /* bytes */
	uint64_t length;
	uint64_t token[2]; /* of the intent */
};

/* A COMPARE_AND_WRITE that was carried out: what its caller is told who asks again. */
struct range_done {
	uint64_t token[2];
	uint64_t offset;
	uint64_t length;
};

struct range_owner {
	/*
	 * Requests under way that change data, of the even and of the odd epoch of the table, and those that
	 * had begun before there was one. Written by the owner alone.
	 */
	_Alignas(64) uint64_t writers[3];
	uint64_t done_count; /* ever */
	struct range_done done[RANGE_DONE];
};

struct range_table {
	uint64_t magic;
	pthread_mutex_t mutex;
	uint32_t used; /* a bit for each entry that is not free: what writers look at */
	uint32_t epoch;
	uint32_t owners; /* the highest that there ever was, plus 1 */
	uint32_t next;	 /* entry to look at first */
	struct range_entry entry[RANGE_ENTRIES];
	struct range_owner owner[RANGE_OWNERS];
	_Alignas(4096) uint8_t data[RANGE_ENTRIES][BDEV_ATOMIC_BYTES]; /* of intents */
};

/* An owner begins: it has no writers yet. */
void range_table_join(struct range_table *table, uint32_t owner);
/* Lock a range: the entry, or -EBUSY while an overlapping one is locked, all are in use, or the table changes.
 */
int range_table_take(struct range_table *table, uint32_t owner, uint64_t offset, uint64_t length);
void range_table_free(struct range_table *table, int entry);
/* Is anything locked? Then, is any of the range? */
static inline bool range_table_is_used(const struct range_table *table)
{
	return __atomic_load_n(&table->used, __ATOMIC_ACQUIRE);
}

bool range_table_covers(const struct range_table *table, uint64_t offset, uint64_t length);
/* Make an orphan one's own: the entry, which is RANGE_PENDING, or -ENOENT. */
int range_table_adopt(struct range_table *table, uint32_t owner);

/* The holder of an entry: what it is going to write stands in data[entry]. */
void range_table_intend(struct range_table *table, int entry, const uint64_t token[2]);
/* It was written, by @owner; or will not be. */
void range_table_written(struct range_table *table, int entry, uint32_t owner);
void range_table_drop(struct range_table *table, int entry);
/* Was it written? */
bool range_table_was_done(const struct range_table *table, const uint64_t token[2], uint64_t offset,
			  uint64_t length);

#endif
