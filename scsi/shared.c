#include "scsi/shared.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAGIC 0x74696e7569736373u /* "scsiunit" */

/* --- life ------------------------------------------------------------------------------------------- */

uint64_t scsi_shared_size(void)
{
	return (sizeof(struct scsi_shared) + 4095) & ~(uint64_t)4095;
}

static struct scsi_shared *map(int fd)
{
	void *address = mmap(NULL, scsi_shared_size(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	return address == MAP_FAILED ? NULL : address;
}

static int init_lock(pthread_mutex_t *lock)
{
	pthread_mutexattr_t attributes;
	int rc = pthread_mutexattr_init(&attributes);

	if (rc == 0) {
		pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
		pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
		rc = pthread_mutex_init(lock, &attributes);
		pthread_mutexattr_destroy(&attributes);
	}
	return -rc;
}

int scsi_shared_init(int fd)
{
	struct scsi_shared *shared;
	struct scsi_state *state;
	int rc;

	if (ftruncate(fd, (off_t)scsi_shared_size()) < 0) {
		return -errno;
	}
	shared = map(fd);
	if (shared == NULL) {
		return -errno;
	}
	state = &shared->states[0];
	state->pr_holder = SCSI_NO_NEXUS;
	state->reserved_by = SCSI_NO_NEXUS;
	state->write_cache = true;
	rc = init_lock(&shared->lock);
	atomic_store(&shared->generation, 1);
	shared->magic = MAGIC;
	munmap(shared, scsi_shared_size());
	return rc;
}

struct scsi_shared *scsi_shared_map(int fd)
{
	struct scsi_shared *shared;
	struct stat status;

	if (fstat(fd, &status) < 0) {
		return NULL;
	}
	if ((uint64_t)status.st_size != scsi_shared_size()) {
		errno = EPROTO;
		return NULL;
	}
	shared = map(fd);
	if (shared != NULL && shared->magic != MAGIC) {
		munmap(shared, scsi_shared_size());
		errno = EPROTO;
		return NULL;
	}
	return shared;
}

void scsi_shared_unmap(struct scsi_shared *shared)
{
	munmap(shared, scsi_shared_size());
}

/* --- the lock, and changes under it ----------------------------------------------------------------- */

void shared_lock(struct scsi_shared *shared)
{
	/* A holder that died left the current state whole: only the lock needs repair. */
	if (pthread_mutex_lock(&shared->lock) == EOWNERDEAD) {
		pthread_mutex_consistent(&shared->lock);
	}
}

void shared_unlock(struct scsi_shared *shared)
{
	pthread_mutex_unlock(&shared->lock);
}

struct scsi_state *shared_edit(struct scsi_shared *shared)
{
	const struct scsi_state *now = shared_state(shared);
	struct scsi_state *next = &shared->states[now == &shared->states[0]];

	*next = *now;
	return next;
}

static void changed(struct scsi_shared *shared)
{
	atomic_fetch_add_explicit(&shared->generation, 1, memory_order_release);
}

void shared_commit(struct scsi_shared *shared)
{
	atomic_fetch_xor_explicit(&shared->current, 1, memory_order_release);
	changed(shared);
}

/* --- nexuses and unit attentions -------------------------------------------------------------------- */

void shared_attend(struct scsi_shared *shared, uint32_t nexus, enum scsi_attention attention)
{
	atomic_fetch_or(&shared->attentions[nexus], 1u << attention);
	changed(shared);
}

void scsi_shared_attention(struct scsi_shared *shared, enum scsi_attention attention, int except)
{
	shared_lock(shared);
	for (int i = 0; i < SCSI_MAX_NEXUSES; i++) {
		if (i != except && shared_state(shared)->nexus[i].used) {
			shared_attend(shared, (uint32_t)i, attention);
		}
	}
	shared_unlock(shared);
}

int nexus_find(const struct scsi_state *state, uint64_t initiator, uint64_t target)
{
	for (int i = 0; i < SCSI_MAX_NEXUSES; i++) {
		const struct scsi_nexus *nexus = &state->nexus[i];

		if (nexus->used && nexus->initiator == initiator && nexus->target == target) {
			return i;
		}
	}
	return -ENOENT;
}

static int find_place(const struct scsi_state *state)
{
	for (int i = 0; i < SCSI_MAX_NEXUSES; i++) {
		if (!state->nexus[i].used) {
			return i;
		}
	}
	return -ENOSPC;
}

int nexus_add(struct scsi_state *state, uint64_t initiator, uint64_t target, uint16_t port)
{
	int place = find_place(state);

	if (place >= 0) {
		state->nexus[place] = (struct scsi_nexus){
		    .initiator = initiator,
		    .target = target,
		    .port = port,
		    .used = true,
		};
	}
	return place;
}

void nexus_unregister(struct scsi_state *state, uint32_t nexus)
{
	state->nexus[nexus].key = 0;
	state->nexus[nexus].done.valid = false;
	state->nexus[nexus].used = state->nexus[nexus].present;
}

int shared_attach(struct scsi_shared *shared, uint64_t initiator, uint64_t target, uint16_t port)
{
	struct scsi_state *state;
	int found;

	shared_lock(shared);
	state = shared_edit(shared);
	found = nexus_find(state, initiator, target);
	if (found < 0) {
		found = nexus_add(state, initiator, target, port);
		if (found >= 0) {
			atomic_store(&shared->attentions[found], 1u << SCSI_ATTENTION_POWER_ON);
		}
	}
	if (found >= 0 && !state->nexus[found].present) {
		state->nexus[found].present = true;
		shared_commit(shared);
	}
	shared_unlock(shared);
	return found;
}

void scsi_shared_reset(struct scsi_shared *shared)
{
	struct scsi_state *state;

	shared_lock(shared);
	state = shared_edit(shared);
	state->reserved_by = SCSI_NO_NEXUS;
	state->stopped = false;
	state->write_cache = true;
	state->descriptor_sense = false;
	state->write_protect = false;
	for (uint32_t i = 0; i < SCSI_MAX_NEXUSES; i++) {
		state->nexus[i].prevents_removal = false;
		state->nexus[i].aca = false;
		shared->copies[i].status = COPY_NONE;
		if (state->nexus[i].used) {
			shared_attend(shared, i, SCSI_ATTENTION_RESET);
		}
	}
	shared_commit(shared);
	shared_unlock(shared);
}

/* What an I_T nexus loss undoes, SAM-6 section 6.3.4; with the lock, of a state to change. */
static void release_held(struct scsi_state *state, uint32_t nexus)
{
	state->nexus[nexus].prevents_removal = false;
	state->nexus[nexus].aca = false;
	if (state->reserved_by == nexus) {
		state->reserved_by = SCSI_NO_NEXUS;
	}
}

void shared_set_aca(struct scsi_shared *shared, uint32_t nexus, bool aca)
{
	shared_lock(shared);
	if (shared_state(shared)->nexus[nexus].aca != aca) {
		shared_edit(shared)->nexus[nexus].aca = aca;
		shared_commit(shared);
	}
	shared_unlock(shared);
}

void shared_nexus_reset(struct scsi_shared *shared, uint32_t nexus)
{
	shared_lock(shared);
	release_held(shared_edit(shared), nexus);
	shared_attend(shared, nexus, SCSI_ATTENTION_NEXUS_LOSS);
	shared_commit(shared);
	shared_unlock(shared);
}

/* A nexus has ended: nothing of it is in flight. */
static void lose_nexus(struct scsi_shared *shared, struct scsi_state *state, uint32_t nexus)
{
	uint32_t seats = atomic_load(&shared->seats_used);

	release_held(state, nexus);
	shared->copies[nexus].status = COPY_NONE;
	for (uint32_t i = 0; i < seats; i++) { /* whatever a reactor that died left there */
		atomic_store(&shared->seats[i].changing[nexus], 0);
	}
}

void scsi_shared_nexus_lost(struct scsi_shared *shared, uint64_t initiator, uint64_t target,
			    enum scsi_attention attention)
{
	struct scsi_state *state;
	int found;

	shared_lock(shared);
	state = shared_edit(shared);
	found = nexus_find(state, initiator, target);
	if (found >= 0) {
		lose_nexus(shared, state, (uint32_t)found);
		shared_attend(shared, (uint32_t)found, attention);
		shared_commit(shared);
	}
	shared_unlock(shared);
}

void scsi_shared_nexus_gone(struct scsi_shared *shared, uint64_t initiator, uint64_t target)
{
	struct scsi_state *state;
	int found;

	shared_lock(shared);
	state = shared_edit(shared);
	found = nexus_find(state, initiator, target);
	if (found >= 0) {
		struct scsi_nexus *nexus = &state->nexus[found];

		lose_nexus(shared, state, (uint32_t)found);
		nexus->present = false;
		nexus->done.valid = false;
		nexus->used = nexus->key != 0;
		atomic_store(&shared->attentions[found], 1u << SCSI_ATTENTION_NEXUS_LOSS);
		shared_commit(shared);
	}
	shared_unlock(shared);
}

int scsi_shared_nexus(struct scsi_shared *shared, uint64_t initiator, uint64_t target)
{
	int found;

	shared_lock(shared);
	found = nexus_find(shared_state(shared), initiator, target);
	shared_unlock(shared);
	return found;
}

uint32_t scsi_shared_nexuses(struct scsi_shared *shared)
{
	uint32_t count = 0;

	shared_lock(shared);
	for (uint32_t i = 0; i < SCSI_MAX_NEXUSES; i++) {
		count += shared_state(shared)->nexus[i].used;
	}
	shared_unlock(shared);
	return count;
}

void scsi_shared_sit(struct scsi_shared *shared, uint32_t seat)
{
	shared_lock(shared);
	for (uint32_t i = 0; i < SCSI_MAX_NEXUSES; i++) {
		atomic_store(&shared->seats[seat].changing[i], 0);
	}
	if (seat >= atomic_load(&shared->seats_used)) {
		atomic_store(&shared->seats_used, seat + 1);
	}
	shared_unlock(shared);
}
