/*
 * Counting a latency. All requests to all devices do it, so it has a file of its own, by which
 * `python -m benchmarks.instructions` tells what it costs.
 */
#ifndef BDEV_HISTOGRAM_H
#define BDEV_HISTOGRAM_H

#include "bdev/bdev.h"

/* A histogram's ranges begin at powers of two: the highest bit says which one, those after it where. */
static inline uint32_t histogram_bucket(uint64_t ticks)
{
	unsigned high = 63 - (unsigned)__builtin_clzll(ticks | 1U << BDEV_HISTOGRAM_BITS);
	uint64_t range = high - BDEV_HISTOGRAM_BITS, bucket;

	/* The first of the bits counts as one range more, but where it is not set. */
	bucket = (range << BDEV_HISTOGRAM_BITS) + (ticks >> range);
	return __builtin_expect(bucket < BDEV_HISTOGRAM_BUCKETS, 1) ? (uint32_t)bucket
								    : BDEV_HISTOGRAM_BUCKETS - 1;
}

static inline void histogram_count(struct bdev_histograms *histograms, unsigned op, uint64_t ticks)
{
	histograms->bucket[op][histogram_bucket(ticks)]++;
}

#endif
