#include "vhost/pattern.h"

#define MAGIC 0x76686f7374696f31 /* "vhostio1" */
#define WORDS (PATTERN_SECTOR / sizeof(uint64_t))

/* A sector begins with these words; the others follow from the checksum. */
enum { WORD_MAGIC, WORD_OFFSET, WORD_STAMP, WORD_CHECKSUM, HEADER_WORDS };

/* The finaliser of splitmix64: each bit of the result depends on every bit of the value. */
static uint64_t mix(uint64_t value)
{
	value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
	value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
	return value ^ (value >> 31);
}

static uint64_t checksum(uint64_t offset, uint64_t stamp)
{
	return mix(mix(offset ^ MAGIC) + stamp);
}

static uint64_t expected_word(uint64_t offset, uint64_t stamp, uint64_t sum, unsigned i)
{
	switch (i) {
	case WORD_MAGIC:
		return MAGIC;
	case WORD_OFFSET:
		return offset;
	case WORD_STAMP:
		return stamp;
	case WORD_CHECKSUM:
		return sum;
	default:
		return mix(sum + i);
	}
}

void pattern_fill(uint64_t *sector, uint64_t offset, uint64_t stamp)
{
	uint64_t sum = checksum(offset, stamp);

	for (unsigned i = 0; i < WORDS; i++) {
		sector[i] = expected_word(offset, stamp, sum, i);
	}
}

enum pattern_verdict pattern_check(const uint64_t *sector, uint64_t offset, uint64_t stamp,
				   struct pattern_difference *difference)
{
	uint64_t sum = checksum(offset, stamp);

	for (unsigned i = 0; i < WORDS; i++) {
		uint64_t expected = expected_word(offset, stamp, sum, i);

		if (sector[i] != expected) {
			difference->offset = offset + i * sizeof(uint64_t);
			difference->expected = expected;
			difference->got = sector[i];
			return PATTERN_BAD;
		}
	}
	return PATTERN_GOOD;
}

enum pattern_verdict pattern_check_unknown(const uint64_t *sector, uint64_t offset,
					   struct pattern_difference *difference)
{
	if (sector[WORD_MAGIC] != MAGIC) {
		return PATTERN_NONE;
	}
	return pattern_check(sector, offset, sector[WORD_STAMP], difference);
}
