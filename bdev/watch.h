/*
 * Requests that take too long: which they are, where they are, and, where one asks for it, their end. A handle
 * is watched only where somebody has set a limit; then its requests stand in a list, oldest first, so that what
 * is due is found at its front.
 */
#ifndef BDEV_WATCH_H
#define BDEV_WATCH_H

#include "bdev/bdev.h"

/* cffi: begin */
#define BDEV_SLOW_KEPT 64 /* of those that have ended */

struct bdev_watch_setup {
	uint64_t slow_ns;    /* a request that takes longer is remembered; 0: none */
	uint64_t timeout_ns; /* one that takes longer is reported: NOTICE_LOG; 0: none */
	bool abort;	     /* ... and aborted, where the device can */
};

struct bdev_slow_request {
	uint64_t offset;
	uint64_t length;
	uint64_t age;	/* ticks: until now, or until it ended */
	uint64_t ended; /* ticks; 0: it is in flight */
	uint32_t op;	/* enum bdev_op */
	uint32_t stage; /* enum bdev_stage: where it is, or where it was last */
	int32_t status; /* that it ended with */
	bool timed_out;
};

/* Watch the requests on an open handle from now on; with no limits, no more. 0 or -ENOMEM. */
int bdev_set_watch(struct bdev *bdev, const struct bdev_watch_setup *setup);
/* Those over the limit: in flight, oldest first, then those that have ended, the last one first. Returns how
 * many. */
uint32_t bdev_slow_requests(struct bdev *bdev, struct bdev_slow_request *out, uint32_t max);
/* The name of a stage. */
const char *bdev_stage_name(uint32_t stage);
/* cffi: end */

/* For detour.c. */
void watch_begin(struct bdev_watch *watch, struct bdev_io *io);
void watch_end(struct bdev_watch *watch, struct bdev_io *io, int status);
/* For bdev.c. */
void watch_free(struct bdev_watch *watch);

#endif
