/* The arithmetic of limits: when something may start. Reactors that charge at the same time are all counted. */
#include "bdev/qos.h"

static uint64_t load(const uint64_t *value)
{
	return __atomic_load_n(value, __ATOMIC_RELAXED);
}

static uint64_t later(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

/* @now, or as much before as unused time is kept. */
static uint64_t since(uint64_t now, uint64_t slack)
{
	return now > slack ? now - slack : 0;
}

/* How much of a limit a request takes. */
static inline uint64_t units(unsigned kind, uint32_t op, uint64_t length)
{
	switch (kind) {
	case QOS_RW_IOS:
		return 1;
	case QOS_RW_BYTES:
		return length;
	case QOS_R_BYTES:
		return op != BDEV_WRITE ? length : 0; /* VERIFY as well */
	default:
		return op == BDEV_WRITE ? length : 0;
	}
}

/* The ticks that it may take; 0 without a limit. */
static inline uint64_t cost_of(const struct qos_limit *limit, unsigned kind, uint32_t op, uint64_t length)
{
	uint64_t cost = load(&limit->cost);

	return cost ? (uint64_t)((unsigned __int128)units(kind, op, length) * cost >> 32) : 0;
}

/* Move a point in time on by @cost, from @least at least; returns where it was. */
static inline uint64_t move_on(uint64_t *point, uint64_t least, uint64_t cost)
{
	uint64_t old = load(point), from;

	do {
		from = later(old, least);
	} while (
	    !__atomic_compare_exchange_n(point, &old, from + cost, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
	return from;
}

/* Charge all limits; returns the latest time at which one of them lets it start. */
static inline uint64_t charge(struct qos_limits *limits, uint32_t op, uint64_t length, uint64_t now)
{
	uint64_t start = now;

	for (unsigned kind = 0; kind < QOS_LIMITS; kind++) {
		struct qos_limit *limit = &limits->limit[kind];
		uint64_t cost = cost_of(limit, kind, op, length);

		if (cost) {
			start = later(start, move_on(&limit->next, since(now, load(&limit->slack)), cost));
		}
	}
	return start;
}

/* --- groups --------------------------------------------------------------------------------------------- */

static uint64_t active_members(const struct qos_group *group, uint64_t now)
{
	uint64_t recent = since(now, reactor_ns_to_ticks(QOS_RECENT_NS)), active = 0;

	for (unsigned i = 0; i < QOS_MEMBERS; i++) {
		uint64_t asked = load(&group->member[i].asked);

		active += asked && asked >= recent;
	}
	return active;
}

/* The longest time that a request takes of the group, and when the group has time again for such a one. */
static uint64_t longest_cost(const struct qos_group *group, uint32_t op, uint64_t length, uint64_t *free_at)
{
	uint64_t longest = 0;

	*free_at = 0;
	for (unsigned kind = 0; kind < QOS_LIMITS; kind++) {
		const struct qos_limit *limit = &group->limits.limit[kind];
		uint64_t cost = cost_of(limit, kind, op, length);

		if (cost) {
			longest = later(longest, cost);
			*free_at = later(*free_at, load(&limit->next));
		}
	}
	return longest;
}

/* May @member take the next place? Else when to ask again. */
static bool is_next(struct qos_group *group, struct qos_member *member, uint32_t op, uint64_t length,
		    uint64_t now, uint64_t *ask_at)
{
	uint64_t clock = load(&member->clock), free_at;
	uint64_t cost = longest_cost(group, op, length, &free_at);

	__atomic_store_n(&member->asked, now, __ATOMIC_RELAXED);
	if (!cost) {
		return true;
	}
	if (clock > now && free_at > now) {
		*ask_at = clock < free_at ? clock : free_at;
		return false;
	}
	move_on(&member->clock, since(now, reactor_ns_to_ticks(QOS_ARREARS_NS)),
		cost * active_members(group, now));
	return true;
}

uint64_t qos_reserve(struct qos_limits *limits, struct qos_group *group, uint32_t member, uint32_t op,
		     uint64_t length, uint64_t now, bool *again)
{
	uint64_t start = now;

	*again = false;
	if (group) {
		uint64_t ask_at;

		if (!is_next(group, &group->member[member % QOS_MEMBERS], op, length, now, &ask_at)) {
			*again = true;
			return ask_at;
		}
		start = charge(&group->limits, op, length, now);
	}
	return limits ? later(start, charge(limits, op, length, now)) : start;
}
