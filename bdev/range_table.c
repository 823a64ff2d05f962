#include "bdev/range_table.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAGIC 0x7365676e61726264u /* "dbranges" */

/* --- life ------------------------------------------------------------------------------------------- */

static size_t size_of_table(void)
{
	return (sizeof(struct range_table) + 4095) & ~(size_t)4095;
}

static struct range_table *map(int fd)
{
	struct range_table *table = mmap(NULL, size_of_table(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	return table == MAP_FAILED ? NULL : table;
}

static int init_mutex(pthread_mutex_t *mutex)
{
	pthread_mutexattr_t attributes;
	int rc = pthread_mutexattr_init(&attributes);

	if (rc == 0) {
		pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
		pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
		rc = pthread_mutex_init(mutex, &attributes);
		pthread_mutexattr_destroy(&attributes);
	}
	return -rc;
}

int range_table_init(int fd)
{
	struct range_table *table;
	int rc;

	if (ftruncate(fd, (off_t)size_of_table())) {
		return -errno;
	}
	table = map(fd);
	if (!table) {
		return -errno;
	}
	rc = init_mutex(&table->mutex);
	table->magic = MAGIC;
	range_table_unmap(table);
	return rc;
}

struct range_table *range_table_map(int fd)
{
	struct range_table *table;
	struct stat status;

	if (fstat(fd, &status)) {
		return NULL;
	}
	if ((size_t)status.st_size != size_of_table()) {
		errno = EPROTO;
		return NULL;
	}
	table = map(fd);
	if (table && table->magic != MAGIC) {
		range_table_unmap(table);
		errno = EPROTO;
		return NULL;
	}
	return table;
}

void range_table_unmap(struct range_table *table)
{
	munmap(table, size_of_table());
}

/* --- the mutex: whoever dies with it leaves every entry whole, as its state is written last ----------- */

static enum range_state state_of(const struct range_entry *entry)
{
	return __atomic_load_n(&entry->state, __ATOMIC_ACQUIRE);
}

static void set_state(struct range_entry *entry, enum range_state state)
{
	__atomic_store_n(&entry->state, state, __ATOMIC_RELEASE);
}

/* Before an entry is locked, and before it is free: so the bit of a locked entry is always set. */
static void show_used(struct range_table *table, int entry, bool used)
{
	uint32_t bit = 1U << entry;

	if (used) {
		__atomic_fetch_or(&table->used, bit, __ATOMIC_ACQ_REL);
	} else {
		__atomic_fetch_and(&table->used, ~bit, __ATOMIC_ACQ_REL);
	}
}

static void set_free(struct range_table *table, int entry)
{
	show_used(table, entry, false);
	set_state(&table->entry[entry], RANGE_FREE);
}

/* What a lock call has returned: true if we hold it. */
static bool is_held(struct range_table *table, int rc)
{
	if (rc == EOWNERDEAD) {
		pthread_mutex_consistent(&table->mutex);
		return true;
	}
	return rc == 0;
}

static bool try_lock(struct range_table *table)
{
	return is_held(table, pthread_mutex_trylock(&table->mutex));
}

/* For those who cannot come back later: it is held for less than a microsecond at a time. */
static void lock(struct range_table *table)
{
	(void)is_held(table, pthread_mutex_lock(&table->mutex));
}

static void unlock(struct range_table *table)
{
	pthread_mutex_unlock(&table->mutex);
}

/* --- ranges ------------------------------------------------------------------------------------------- */

bool range_table_covers(const struct range_table *table, uint64_t offset, uint64_t length)
{
	for (int i = 0; i < RANGE_ENTRIES; i++) {
		const struct range_entry *entry = &table->entry[i];

		if (state_of(entry) != RANGE_FREE && offset < entry->offset + entry->length &&
		    entry->offset < offset + length) {
			return true;
		}
	}
	return false;
}

/* The free one that was not used for longest. */
static int find_free(struct range_table *table)
{
	for (uint32_t i = 0; i < RANGE_ENTRIES; i++) {
		uint32_t candidate = (table->next + i) % RANGE_ENTRIES;

		if (table->entry[candidate].state == RANGE_FREE) {
			table->next = (candidate + 1) % RANGE_ENTRIES;
			return (int)candidate;
		}
	}
	return -EBUSY;
}

void range_table_join(struct range_table *table, uint32_t owner)
{
	lock(table);
	if (owner >= table->owners) {
		__atomic_store_n(&table->owners, owner + 1, __ATOMIC_RELEASE);
	}
	unlock(table);
}

int range_table_take(struct range_table *table, uint32_t owner, uint64_t offset, uint64_t length)
{
	int found = -EBUSY;

	if (!try_lock(table)) {
		return -EBUSY;
	}
	if (!range_table_covers(table, offset, length)) {
		found = find_free(table);
	}
	if (found >= 0) {
		struct range_entry *entry = &table->entry[found];

		entry->owner = owner;
		entry->offset = offset;
		entry->length = length;
		show_used(table, found, true);
		set_state(entry, RANGE_LOCKED);
	}
	unlock(table);
	return found;
}

void range_table_free(struct range_table *table, int entry)
{
	set_free(table, entry);
}

uint32_t range_table_owner_gone(struct range_table *table, uint32_t owner)
{
	uint32_t orphans = 0;

	lock(table);
	for (int i = 0; i < RANGE_ENTRIES; i++) {
		struct range_entry *entry = &table->entry[i];

		if (entry->owner == owner && entry->state <= RANGE_LOCKED) {
			set_free(table, i);
		} else if (entry->owner == owner && entry->state == RANGE_PENDING) {
			set_state(entry, RANGE_ORPHAN);
		}
		orphans += entry->state == RANGE_ORPHAN;
	}
	for (int i = 0; i < 3; i++) {
		__atomic_store_n(&table->owner[owner].writers[i], 0, __ATOMIC_RELEASE);
	}
	unlock(table);
	return orphans;
}

int range_table_adopt(struct range_table *table, uint32_t owner)
{
	int found = -ENOENT;

	if (!try_lock(table)) {
		return -ENOENT; /* somebody is at it */
	}
	for (int i = 0; i < RANGE_ENTRIES && found < 0; i++) {
		if (table->entry[i].state == RANGE_ORPHAN) {
			table->entry[i].owner = owner;
			set_state(&table->entry[i], RANGE_PENDING);
			found = i;
		}
	}
	unlock(table);
	return found;
}

uint32_t range_table_used(const struct range_table *table)
{
	return (uint32_t)__builtin_popcount(__atomic_load_n(&table->used, __ATOMIC_ACQUIRE));
}

/* --- intents ------------------------------------------------------------------------------------------ */

void range_table_intend(struct range_table *table, int entry, const uint64_t token[2])
{
	table->entry[entry].token[0] = token[0];
	table->entry[entry].token[1] = token[1];
	set_state(&table->entry[entry], RANGE_PENDING);
}

void range_table_drop(struct range_table *table, int entry)
{
	set_state(&table->entry[entry], RANGE_LOCKED);
}

void range_table_written(struct range_table *table, int entry, uint32_t owner)
{
	const struct range_entry *from = &table->entry[entry];
	struct range_owner *by = &table->owner[owner];

	by->done[by->done_count % RANGE_DONE] = (struct range_done){
	    .token = {from->token[0], from->token[1]}, .offset = from->offset, .length = from->length};
	__atomic_store_n(&by->done_count, by->done_count + 1, __ATOMIC_RELEASE);
	range_table_drop(table, entry);
}

bool range_table_was_done(const struct range_table *table, const uint64_t token[2], uint64_t offset,
			  uint64_t length)
{
	for (uint32_t i = 0; i < table->owners; i++) {
		const struct range_owner *by = &table->owner[i];
		uint64_t count = __atomic_load_n(&by->done_count, __ATOMIC_ACQUIRE);

		for (uint64_t j = 0; j < count && j < RANGE_DONE; j++) {
			const struct range_done *done = &by->done[j];

			if (done->token[0] == token[0] && done->token[1] == token[1] &&
			    done->offset == offset && done->length == length) {
				return true;
			}
		}
	}
	return false;
}
