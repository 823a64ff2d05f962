/*
 * Yardsticks: what is left when a target does nothing but what cannot be left out. Never use them on
 * memory of anyone who is not trusted.
 */
#ifndef BENCHMARKS_BARE_H
#define BENCHMARKS_BARE_H

#include <stdbool.h>

#include "vhost/virtqueue.h"

/* cffi: begin */
/* A virtio-blk device without checks, notifications or events, on the ring of a load generator. */
struct bare_device {
	void *desc;
	void *avail;
	void *used;
	uint32_t size;	 /* entries of the ring */
	uint64_t guest;	 /* guest-physical address of the one region */
	uint8_t *memory; /* where that is mapped */
	uint8_t *store;	 /* the disk, or NULL to move no data */
	int kick;	 /* where to sleep while there is nothing to do (an eventfd), or -1 to spin */
	bool stop;
};

/* Serve until stop is set, and kicked if it sleeps. Whether kicks are wanted is the caller's to tell. */
void bare_serve(struct bare_device *device);
/*
 * Copy random blocks out of the @size bytes of a store to @depth buffers in turn, or the other way (@write);
 * returns copies a second.
 */
double bare_memcpy(uint8_t *store, uint64_t size, uint8_t *buffers, uint32_t block, uint32_t depth, bool write,
		   double seconds);
/* cffi: end */

#endif
