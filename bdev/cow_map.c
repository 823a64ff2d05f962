#include "bdev/cow_map.h"

uint64_t cow_map_blocks(const struct cow_layout *layout)
{
	uint32_t bits = bitmap_bits(layout->block_size);

	return (layout->clusters + bits - 1) / bits;
}

static uint64_t words_of(const struct cow_layout *layout)
{
	return cow_map_blocks(layout) * (bitmap_bits(layout->block_size) / 64);
}

uint64_t cow_map_size(const struct cow_layout *layout)
{
	return sizeof(struct cow_map) + words_of(layout) * sizeof(uint64_t) +
	       (layout->clusters + cow_map_blocks(layout)) * sizeof(uint16_t);
}

void cow_map_init(struct cow_map *map, const struct cow_layout *layout)
{
	map->layout = *layout;
	map->blocks = cow_map_blocks(layout);
	map->claims = sizeof(*map) + words_of(layout) * sizeof(uint64_t);
	map->locks = map->claims + layout->clusters * sizeof(uint16_t);
}

uint64_t cow_map_count(const struct cow_map *map)
{
	uint64_t count = 0;

	for (uint64_t i = 0; i < words_of(&map->layout); i++) {
		count += (unsigned)__builtin_popcountll(__atomic_load_n(&map->words[i], __ATOMIC_RELAXED));
	}
	return count;
}

void cow_map_forsake(struct cow_map *map, uint16_t owner)
{
	/* Claims first: who then takes the lock of a block finds them as they will be. */
	owned_forsake(cow_map_claim(map, 0), map->layout.clusters, owner);
	owned_forsake(cow_map_lock(map, 0), map->blocks, owner);
}

uint64_t cow_map_find(const struct cow_map *map, uint64_t cluster, uint64_t end, bool present)
{
	while (cluster < end) {
		uint64_t word = __atomic_load_n(&map->words[cluster / 64], __ATOMIC_ACQUIRE);

		word = (present ? word : ~word) >> (cluster % 64);
		if (word) {
			cluster += (unsigned)__builtin_ctzll(word);
			return cluster < end ? cluster : end;
		}
		cluster = (cluster / 64 + 1) * 64;
	}
	return end;
}

void cow_map_settle(struct cow_map *map, uint64_t first, uint64_t count)
{
	for (uint64_t i = first; i < first + count; i++) {
		__atomic_fetch_or(&map->words[i / 64], 1ULL << (i % 64), __ATOMIC_RELEASE);
		owned_release(cow_map_claim(map, i));
	}
}

void cow_map_image(struct cow_map *map, uint64_t index, struct bitmap_block *block)
{
	uint32_t bits = bitmap_bits(map->layout.block_size);
	uint64_t first = index * bits, left = map->layout.clusters - first;

	for (uint32_t i = 0; i < bits / 64; i++) {
		block->words[i] = __atomic_load_n(&map->words[first / 64 + i], __ATOMIC_ACQUIRE);
	}
	for (uint32_t i = 0; i < bits && i < left; i++) {
		if (__atomic_load_n(cow_map_claim(map, first + i), __ATOMIC_ACQUIRE) & COW_READY) {
			block->words[i / 64] |= 1ULL << (i % 64);
		}
	}
	bitmap_seal(block, (uint32_t)index, map->layout.block_size);
}
