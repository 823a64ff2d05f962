/*
 * Mappings of what somebody else may take away: a file that a front-end truncates, the registers of a device
 * that is pulled out. The next access to such a page raises SIGBUS; here that costs the owner of the mapping
 * its session or its device, not us our process.
 */
#ifndef REACTOR_MAPPING_H
#define REACTOR_MAPPING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
/* Install the process-wide SIGBUS handler. 0 or -errno. */
int mapping_guard(void);
/* cffi: end */

struct mapping {
	uint8_t *data; /* what was asked for */
	void *map;     /* what is mapped: begins at a page, NULL when nothing is */
	size_t map_size;
	bool *lost; /* set once a page of it was gone */
	struct mapping *next;
};

/* Map [offset, offset + size) of @fd, which stays the caller's; @lost outlives the mapping. 0 or -errno. */
int mapping_create(struct mapping *mapping, int fd, uint64_t offset, uint64_t size, bool *lost);
/* What one has mapped, the other has from now on: both are of the same size, and nobody uses them. */
void mapping_swap(struct mapping *a, struct mapping *b);
void mapping_destroy(struct mapping *mapping); /* a no-op when nothing is mapped */

#endif
