#include <errno.h>
#include <string.h>

#include "bdev/mirror_disk.h"

_Static_assert(sizeof(struct mirror_super) <= 512, "a superblock is one block");

static uint64_t regions_of(const struct mirror_super *super)
{
	uint64_t size = super->num_blocks * super->block_size;

	return (size + super->region_size - 1) / super->region_size;
}

static uint64_t blocks_of(const struct mirror_super *super)
{
	uint32_t bits = bitmap_bits(super->block_size);

	return (regions_of(super) + bits - 1) / bits;
}

static uint64_t align(uint64_t bytes)
{
	return (bytes + 63) & ~(uint64_t)63;
}

uint64_t mirror_shared_size(const struct mirror_super *super, uint64_t owners)
{
	uint64_t regions = regions_of(super);

	return align(sizeof(struct mirror_shared)) + align(regions) +
	       align(blocks_of(super) * sizeof(uint16_t)) + owners * align(regions * sizeof(uint32_t));
}

void mirror_shared_init(struct mirror_shared *shared, const struct mirror_super *super, uint64_t owners)
{
	shared->super = *super;
	shared->regions = regions_of(super);
	shared->blocks = blocks_of(super);
	shared->owners = owners;
	shared->flags_at = align(sizeof(*shared));
	shared->locks_at = shared->flags_at + align(shared->regions);
	shared->counts_at = shared->locks_at + align(shared->blocks * sizeof(uint16_t));
}

uint32_t *mirror_counts(struct mirror_shared *shared, uint16_t owner)
{
	uint64_t stride = align(shared->regions * sizeof(uint32_t));

	return (uint32_t *)((uint8_t *)shared + shared->counts_at + (owner - 1) * stride);
}

uint64_t mirror_find(const struct mirror_shared *shared, uint64_t region, uint32_t flags)
{
	const uint8_t *all = mirror_flag_at(shared, 0); /* aligned; after the last one are zeroes */

	while (region < shared->regions && !(mirror_flags(shared, region) & flags)) {
		/* Most regions have no flags at all: eight at a time. */
		if (region % 8 == 0 && !__atomic_load_n((const uint64_t *)(all + region), __ATOMIC_RELAXED)) {
			region += 8;
		} else {
			region++;
		}
	}
	return region < shared->regions ? region : shared->regions;
}

uint64_t mirror_count(const struct mirror_shared *shared, uint32_t flags)
{
	uint64_t count = 0;

	for (uint64_t i = mirror_find(shared, 0, flags); i < shared->regions;
	     i = mirror_find(shared, i + 1, flags)) {
		count++;
	}
	return count;
}

void mirror_mark(struct mirror_shared *shared, uint32_t set, uint32_t clear)
{
	for (uint64_t i = 0; set && i < shared->regions; i++) {
		mirror_set(shared, i, set);
	}
	for (uint64_t i = mirror_find(shared, 0, clear); i < shared->regions;
	     i = mirror_find(shared, i + 1, clear)) {
		mirror_clear(shared, i, clear);
	}
}

void mirror_mark_where(struct mirror_shared *shared, uint32_t where, uint32_t set)
{
	for (uint64_t i = mirror_find(shared, 0, where); i < shared->regions;
	     i = mirror_find(shared, i + 1, where)) {
		mirror_set(shared, i, set);
	}
}

void mirror_load(struct mirror_shared *shared, uint64_t index, const void *words, uint32_t flags)
{
	uint32_t bits = bitmap_bits(shared->super.block_size);
	const uint8_t *bytes = words;

	for (uint32_t i = 0; i < bits && index * bits + i < shared->regions; i++) {
		if (bytes[i / 8] >> (i % 8) & 1) {
			mirror_set(shared, index * bits + i, MIRROR_DIRTY | flags);
		}
	}
}

enum mirror_state mirror_leg_state(const struct mirror_shared *shared, uint32_t place)
{
	uint64_t legs = __atomic_load_n(&shared->legs, __ATOMIC_SEQ_CST);

	if (legs & MIRROR_BIT(place)) {
		return MIRROR_ACTIVE;
	}
	return legs & MIRROR_BIT(place + MIRROR_LEGS) ? MIRROR_REBUILDING : MIRROR_MISSING;
}

int mirror_leg_set(struct mirror_shared *shared, uint32_t place, enum mirror_state state)
{
	uint64_t old = __atomic_load_n(&shared->legs, __ATOMIC_SEQ_CST), new;

	do {
		new = old & ~(MIRROR_BIT(place) | MIRROR_BIT(place + MIRROR_LEGS));
		if (state == MIRROR_ACTIVE) {
			new |= MIRROR_BIT(place);
		} else if (state == MIRROR_REBUILDING) {
			new |= MIRROR_BIT(place + MIRROR_LEGS);
		}
		if (new == old) {
			return 0;
		}
		if (state == MIRROR_ACTIVE && !(old & MIRROR_BIT(place + MIRROR_LEGS))) {
			return -ENODEV;
		}
		if (!(new &MIRROR_ALL_ACTIVE)) {
			return -EBUSY;
		}
	} while (
	    !__atomic_compare_exchange_n(&shared->legs, &old, new, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
	__atomic_fetch_add(&shared->changed, 1, __ATOMIC_SEQ_CST);
	return 0;
}

void mirror_forsake(struct mirror_shared *shared, uint16_t owner)
{
	uint32_t *counts = mirror_counts(shared, owner);

	for (uint64_t i = 0; i < shared->regions; i++) {
		if (counts[i]) {
			mirror_set(shared, i, MIRROR_SUSPECT);
			counts[i] = 0;
		}
	}
	if (shared->syncer == owner) {
		mirror_mark(shared, 0, MIRROR_LOCKED);
		owned_release(&shared->syncer);
	}
	owned_forsake(mirror_lock(shared, 0), shared->blocks, owner);
	owned_forsake(&shared->super_lock, 1, owner);
}

bool mirror_is_quiet(struct mirror_shared *shared, uint64_t region)
{
	for (uint16_t owner = 1; owner <= shared->owners; owner++) {
		if (__atomic_load_n(&mirror_counts(shared, owner)[region], __ATOMIC_SEQ_CST)) {
			return false;
		}
	}
	return true;
}
