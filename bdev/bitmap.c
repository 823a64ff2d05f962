#include "bdev/bitmap.h"

#include <stddef.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words go to the device as they are");
_Static_assert(offsetof(struct bitmap_block, words) == 8, "the head is two words of 32 bits");

uint32_t bitmap_bits(uint32_t block_size)
{
	return (block_size - (uint32_t)sizeof(struct bitmap_block)) * 8;
}

/* Four bits at a time: blocks are small, and written seldom. */
uint32_t bitmap_checksum(const void *data, uint64_t length)
{
	static const uint32_t table[16] = {
	    0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
	    0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c,
	};
	const uint8_t *bytes = data;
	uint32_t crc = ~0U;

	for (uint64_t i = 0; i < length; i++) {
		crc ^= bytes[i];
		crc = crc >> 4 ^ table[crc & 15];
		crc = crc >> 4 ^ table[crc & 15];
	}
	return ~crc;
}

void bitmap_seal(struct bitmap_block *block, uint32_t index, uint32_t block_size)
{
	block->index = index;
	block->checksum = bitmap_checksum(&block->index, block_size - sizeof(block->checksum));
}

void owned_forsake(uint16_t *words, uint64_t count, uint16_t owner)
{
	for (uint64_t i = 0; i < count; i++) {
		if ((__atomic_load_n(&words[i], __ATOMIC_RELAXED) & OWNED_MASK) == owner) {
			owned_release(&words[i]);
		}
	}
}
