/*
 * A block device that a Python class is, in a process of its own. Each reactor that has it open shares an area
 * of memory with that process: requests, and a buffer for each. An eventfd for each direction says that there
 * is something to look at. Memory and eventfds are the control process's: either side may die and be replaced.
 */
#ifndef BDEV_PYTHON_H
#define BDEV_PYTHON_H

#include "bdev/bdev.h"

/* cffi: begin */
#define PYTHON_SLOTS 64	    /* requests of one reactor at a time; others wait */
#define PYTHON_PIECE 262144 /* bytes of data that one request of the class has at most */
#define PYTHON_DATA 4096    /* where the buffers begin in the area */

enum python_state {
	PYTHON_FREE,
	PYTHON_ASKED,	  /* the reactor has filled it in */
	PYTHON_TAKEN,	  /* the class works on it */
	PYTHON_ANSWERED,  /* status is there, and the data that was read */
	PYTHON_ABANDONED, /* was taken, and the reactor has given up waiting */
};

struct python_request {
	uint64_t offset; /* bytes */
	uint64_t length;
	uint32_t op;	/* enum bdev_op */
	uint32_t flags; /* BDEV_IO_* */
	int32_t status; /* 0 or -errno */
	uint32_t state; /* enum python_state */
};

struct python_area;

struct python_setup {
	int memory_fd; /* PYTHON_DATA + PYTHON_SLOTS * PYTHON_PIECE bytes, zeroed; these are the handle's own
			  once */
	int ask_fd;    /* ... it is open: eventfds, */
	int answer_fd; /* ... written by the reactor and by the process of the class */
	uint32_t block_size;
	uint64_t block_count;
	uint32_t supported; /* 1 << enum bdev_op */
	bool readonly;
	uint64_t timeout_ns; /* from submission, after which a request ends with -ETIMEDOUT */
};

/* NULL and errno on failure, and the descriptors stay the caller's. */
struct bdev *python_bdev_open(struct reactor *reactor, uint64_t id, uint32_t slot,
			      const struct python_setup *setup);

/* The process of the class: map an area. What its predecessor had taken is asked anew. NULL and errno. */
struct python_area *python_area_map(int memory_fd);
void python_area_unmap(struct python_area *area);
/* Take the next request that is asked for: its slot, and a copy of it; -1 when there is none. */
int python_area_take(struct python_area *area, struct python_request *copy);
/* The slot's buffer of PYTHON_PIECE bytes. */
void *python_area_data(struct python_area *area, uint32_t slot);
/* Say how it has ended; the reactor is told by the answering eventfd. */
void python_area_answer(struct python_area *area, uint32_t slot, int status);
/* cffi: end */

#endif
