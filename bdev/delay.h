/* A block device on another one that takes longer. */
#ifndef BDEV_DELAY_H
#define BDEV_DELAY_H

#include "bdev/bdev.h"

/* cffi: begin */
/* Nanoseconds that are added; p99 is for one request in a hundred, by chance. */
struct delay_latency {
	uint64_t avg_read;
	uint64_t p99_read;
	uint64_t avg_write; /* and everything else that is no READ */
	uint64_t p99_write;
};

/* @seed: of chance. NULL and errno on failure. */
struct bdev *delay_bdev_open(uint64_t id, uint32_t slot, uint64_t block_count, struct bdev *base,
			     const struct delay_latency *latency, uint32_t seed);
/* For requests that end from now on. */
void delay_bdev_set_latency(struct bdev *bdev, const struct delay_latency *latency);
/* cffi: end */

#endif
