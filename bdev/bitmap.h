/*
 * Bitmaps that are kept on devices, in blocks that are each written at once and prove themselves: a checksum,
 * the block's place, then its bits. And words in shared memory that one reactor holds at a time, by which
 * reactors agree on who writes a block.
 */
#ifndef BDEV_BITMAP_H
#define BDEV_BITMAP_H

#include <stdbool.h>
#include <stdint.h>

/* cffi: begin */
/* On the device: little-endian, one block of it. */
struct bitmap_block {
	uint32_t checksum; /* CRC-32 of all that follows */
	uint32_t index;	   /* of this block in its bitmap */
	uint64_t words[];
};

/* How many bits a block of so many bytes has: a multiple of 64. */
uint32_t bitmap_bits(uint32_t block_size);
/* CRC-32 as of IEEE 802.3 and zlib. */
uint32_t bitmap_checksum(const void *data, uint64_t length);
/* Have every word that @owner holds be nobody's: it is dead, and nothing of it can still happen. */
void owned_forsake(uint16_t *words, uint64_t count, uint16_t owner);
/* cffi: end */

/* Fill in the head of a block whose words are complete. */
void bitmap_seal(struct bitmap_block *block, uint32_t index, uint32_t block_size);

#define OWNED_NOBODY 0
#define OWNED_FLAG 0x8000 /* for the holder's use; owners are 1 to 0x7fff */
#define OWNED_MASK 0x7fff

/* Hold a word; false if somebody does already. */
static inline bool owned_take(uint16_t *word, uint16_t owner)
{
	uint16_t nobody = OWNED_NOBODY;

	return __atomic_compare_exchange_n(word, &nobody, owner, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

static inline void owned_release(uint16_t *word)
{
	__atomic_store_n(word, OWNED_NOBODY, __ATOMIC_RELEASE);
}

#endif
