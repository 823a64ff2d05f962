#include "scsi/unit.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include "reactor/barrier.h"
#include "scsi/fence.h"
#include "scsi/spec.h"
#include "scsi/wait.h"

/* --- targets ---------------------------------------------------------------------------------------- */

struct scsi_target *scsi_target_create(const struct scsi_ports *ports)
{
	struct scsi_target *target = calloc(1, sizeof(*target));

	if (target != NULL) {
		barrier_register();
		target->ports = *ports;
	}
	return target;
}

void scsi_target_free(struct scsi_target *target)
{
	for (uint32_t lun = 0; lun < SCSI_MAX_UNITS; lun++) {
		free(target->units[lun]);
	}
	free(target);
}

int scsi_target_add(struct scsi_target *target, uint32_t lun, struct bdev *bdev, const struct scsi_place *place,
		    const struct scsi_identity *identity)
{
	struct scsi_unit *unit;
	int nexus;

	if (lun >= SCSI_MAX_UNITS || place->seat >= SCSI_MAX_SEATS) {
		return -EINVAL;
	}
	if (target->units[lun] != NULL) {
		return -EEXIST;
	}
	nexus =
	    shared_attach(place->shared, target->ports.initiator, target->ports.target, target->ports.relative);
	if (nexus < 0) {
		return nexus;
	}
	unit = calloc(1, sizeof(*unit));
	if (unit == NULL) {
		return -ENOMEM;
	}
	unit->bdev = bdev;
	unit->reactor = bdev->reactor;
	unit->shared = place->shared;
	unit->news = place->news;
	unit->keeps = place->keeps;
	unit->target = target;
	unit->nexus = (uint32_t)nexus;
	unit->lun = lun;
	unit->identity = *identity;
	unit->waiting_tail = &unit->waiting;
	wait_init(unit);
	unit->changing = &place->shared->seats[place->seat].changing[nexus];
	target->units[lun] = unit;
	return 0;
}

int scsi_target_remove(struct scsi_target *target, uint32_t lun)
{
	struct scsi_unit *unit = lun < SCSI_MAX_UNITS ? target->units[lun] : NULL;

	if (unit == NULL) {
		return -ENOENT;
	}
	unit->bdev = NULL;
	if (unit->in_flight + unit->held > 0) {
		return -EBUSY;
	}
	target->units[lun] = NULL;
	free(unit);
	return 0;
}

int scsi_target_detach(struct scsi_target *target, uint32_t lun)
{
	if (lun >= SCSI_MAX_UNITS || target->units[lun] == NULL) {
		return -ENOENT;
	}
	target->units[lun]->bdev = NULL;
	return 0;
}

uint32_t scsi_target_in_flight(const struct scsi_target *target)
{
	uint32_t count = 0;

	for (uint32_t lun = 0; lun < SCSI_MAX_UNITS; lun++) {
		const struct scsi_unit *unit = target->units[lun];

		count += unit != NULL ? unit->in_flight + unit->held : 0;
	}
	return count;
}

void scsi_target_clear_aca(struct scsi_target *target, uint32_t lun)
{
	struct scsi_unit *unit = lun < SCSI_MAX_UNITS ? target->units[lun] : NULL;

	if (unit != NULL) {
		shared_set_aca(unit->shared, unit->nexus, false);
	}
}

void scsi_target_nexus_reset(struct scsi_target *target)
{
	for (unsigned i = 0; i < SCSI_MAX_UNITS; i++) {
		struct scsi_unit *unit = target->units[i];

		if (unit != NULL) {
			shared_nexus_reset(unit->shared, unit->nexus);
		}
	}
}

void scsi_target_attention(struct scsi_target *target, int lun, enum scsi_attention attention)
{
	for (int i = 0; i < SCSI_MAX_UNITS; i++) {
		struct scsi_unit *unit = target->units[i];

		if (unit != NULL && (lun == i || lun < 0)) {
			shared_attend(unit->shared, unit->nexus, attention);
		}
	}
}

/* --- reservations, SPC-5 section 5.14 --------------------------------------------------------------- */

static bool is_registrants_only(uint8_t type)
{
	return type >= PR_WRITE_EXCLUSIVE_REGISTRANTS;
}

static bool is_write_exclusive(uint8_t type)
{
	return type == PR_WRITE_EXCLUSIVE || type == PR_WRITE_EXCLUSIVE_REGISTRANTS ||
	       type == PR_WRITE_EXCLUSIVE_ALL;
}

enum scsi_access unit_allowed(const struct scsi_state *state, uint32_t nexus)
{
	if (state->reserved_by != SCSI_NO_NEXUS && state->reserved_by != nexus) {
		return ACCESS_ANY;
	}
	if (state->pr_type == PR_NONE || state->pr_holder == nexus) {
		return ACCESS_CHANGE;
	}
	if (is_registrants_only(state->pr_type) && state->nexus[nexus].key != 0) {
		return ACCESS_CHANGE;
	}
	return is_write_exclusive(state->pr_type) ? ACCESS_READ : ACCESS_PROBE;
}

/* --- unit attentions, SAM-6 section 5.14 ------------------------------------------------------------ */

static const uint16_t attention_codes[SCSI_ATTENTIONS] = {
    [SCSI_ATTENTION_POWER_ON] = ASC_POWER_ON,
    [SCSI_ATTENTION_RESET] = ASC_TARGET_RESET,
    [SCSI_ATTENTION_NEXUS_LOSS] = ASC_NEXUS_LOSS,
    [SCSI_ATTENTION_COMMANDS_CLEARED] = ASC_COMMANDS_CLEARED,
    [SCSI_ATTENTION_REGISTRATIONS_PREEMPTED] = ASC_REGISTRATIONS_PREEMPTED,
    [SCSI_ATTENTION_RESERVATIONS_PREEMPTED] = ASC_RESERVATIONS_PREEMPTED,
    [SCSI_ATTENTION_RESERVATIONS_RELEASED] = ASC_RESERVATIONS_RELEASED,
    [SCSI_ATTENTION_LUNS_CHANGED] = ASC_LUNS_CHANGED,
    [SCSI_ATTENTION_CAPACITY_CHANGED] = ASC_CAPACITY_CHANGED,
    [SCSI_ATTENTION_MODE_CHANGED] = ASC_MODE_CHANGED,
};

uint32_t unit_refresh(struct scsi_unit *unit)
{
	struct scsi_shared *shared = unit->shared;
	const struct scsi_state *state;
	uint32_t generation;
	uint32_t waiting;

	shared_lock(shared);
	/* Before the rest: a condition that another process adds without the lock moves it once more. */
	generation = atomic_load(&shared->generation);
	state = shared_state(shared);
	unit->reserved = unit_allowed(state, unit->nexus);
	unit->aca = state->nexus[unit->nexus].aca;
	unit->sanitize = state->sanitize;
	unit->write_cache = state->write_cache;
	unit->write_protect = state->write_protect || unit->identity.readonly;
	unit->stopped = state->stopped;
	unit->allowed =
	    unit->aca || unit->stopped || unit->sanitize != SCSI_SANITIZE_NONE ? ACCESS_NONE : unit->reserved;
	waiting = atomic_load(&shared->attentions[unit->nexus]);
	shared_unlock(shared);
	unit->generation = waiting == 0 ? generation : 0;
	return waiting;
}

uint16_t unit_take_attention(struct scsi_unit *unit)
{
	_Atomic uint32_t *attentions = &unit->shared->attentions[unit->nexus];
	uint32_t waiting = atomic_load(attentions);

	while (waiting != 0) {
		uint32_t bit = waiting & -waiting;

		/* POWER ON, and any other reset, is the end of all that came before it. */
		uint32_t left = bit <= 1u << SCSI_ATTENTION_RESET ? 0 : waiting & ~bit;

		if (atomic_compare_exchange_strong(attentions, &waiting, left)) {
			return attention_codes[__builtin_ctz(bit)];
		}
	}
	return 0;
}

void unit_tell_news(const struct scsi_unit *unit)
{
	/* It cannot block: nobody writes 2^64 times before the control process reads. */
	(void)eventfd_write(unit->news, 1);
}

void unit_clear_attention(struct scsi_unit *unit, enum scsi_attention attention)
{
	atomic_fetch_and(&unit->shared->attentions[unit->nexus], ~(1u << attention));
}
