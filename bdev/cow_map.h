/*
 * Which clusters of a copy-on-write disk are in its overlay, as all reactors and the control process see it: in
 * shared memory. A bit is set once and never cleared, after the cluster's data and then the block of the map
 * that says so have been written to the overlay. A cluster that is being brought there is claimed by one
 * reactor; so is a block of the map that is being written. What a dead reactor had claimed, the control process
 * takes from it.
 */
#ifndef BDEV_COW_MAP_H
#define BDEV_COW_MAP_H

#include "bdev/bitmap.h"

/* cffi: begin */
/* How an overlay is laid out: header, map, clusters. */
struct cow_layout {
	uint64_t clusters;
	uint64_t map_offset;   /* bytes, where the map begins */
	uint64_t data_offset;  /* bytes, where cluster 0 is; the others follow */
	uint32_t cluster_size; /* bytes, a power of two */
	uint32_t block_size;   /* bytes of a block of the map */
};

struct cow_map {
	struct cow_layout layout;
	uint64_t blocks;  /* of the map */
	uint64_t claims;  /* bytes from the beginning to the clusters' claims */
	uint64_t locks;	  /* bytes to those of the blocks */
	uint64_t words[]; /* the bits: those of a block follow those of the one before */
};

/* How many blocks the map has on the overlay. */
uint64_t cow_map_blocks(const struct cow_layout *layout);
/* How many bytes the map takes in memory. */
uint64_t cow_map_size(const struct cow_layout *layout);
/* Make a map, without any cluster, in so much memory that is zeroes. */
void cow_map_init(struct cow_map *map, const struct cow_layout *layout);
/* How many clusters are in the overlay. */
uint64_t cow_map_count(const struct cow_map *map);
/* The first cluster from @cluster on that is in the overlay, or is not; @end if there is none before it. */
uint64_t cow_map_find(const struct cow_map *map, uint64_t cluster, uint64_t end, bool present);
/* Take from @owner, which is dead, what it had claimed. */
void cow_map_forsake(struct cow_map *map, uint16_t owner);
/* cffi: end */

#define COW_READY OWNED_FLAG /* in a claim: the cluster's data are durable, its bit may be written */

static inline uint16_t *cow_map_claim(struct cow_map *map, uint64_t cluster)
{
	return (uint16_t *)((uint8_t *)map + map->claims) + cluster;
}

/* The block of the map that a cluster's bit is in. */
static inline uint64_t cow_map_block_of(const struct cow_map *map, uint64_t cluster)
{
	return cluster / bitmap_bits(map->layout.block_size);
}

static inline uint16_t *cow_map_lock(struct cow_map *map, uint64_t block)
{
	return (uint16_t *)((uint8_t *)map + map->locks) + block;
}

static inline bool cow_map_has(const struct cow_map *map, uint64_t cluster)
{
	uint64_t word = __atomic_load_n(&map->words[cluster / 64], __ATOMIC_ACQUIRE);

	return word >> (cluster % 64) & 1;
}

/* The clusters are in the overlay, and their claims are over. */
void cow_map_settle(struct cow_map *map, uint64_t first, uint64_t count);
/* Fill in @block as it has to be on the overlay: with all that is there, and all that is ready to be. */
void cow_map_image(struct cow_map *map, uint64_t index, struct bitmap_block *block);

#endif
