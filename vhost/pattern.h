/*
 * What `--verify` writes: every 512-byte sector tells where it belongs, by which write it got there, and
 * that it is whole, so that lost, misplaced, torn and stale data are all found.
 */
#ifndef VHOST_PATTERN_H
#define VHOST_PATTERN_H

#include <stdint.h>

#define PATTERN_SECTOR 512

enum pattern_verdict {
	PATTERN_GOOD,
	PATTERN_NONE, /* the sector holds no pattern */
	PATTERN_BAD,
};

struct pattern_difference {
	uint64_t offset; /* bytes, on the device */
	uint64_t expected;
	uint64_t got;
};

/* Fill one sector for byte @offset of the device; @stamp names the write. */
void pattern_fill(uint64_t *sector, uint64_t offset, uint64_t stamp);
/* Compare with what pattern_fill() wrote. */
enum pattern_verdict pattern_check(const uint64_t *sector, uint64_t offset, uint64_t stamp,
				   struct pattern_difference *difference);
/* The same for a sector of which only itself can say which write it is from. */
enum pattern_verdict pattern_check_unknown(const uint64_t *sector, uint64_t offset,
					   struct pattern_difference *difference);

#endif
