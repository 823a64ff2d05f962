/*
 * A limit on what the queues of a controller carry out a second, whichever disks their requests are for: all
 * of them, on all reactors, draw on the same struct qos_limits in shared memory (bdev/qos.h).
 *
 * A request that has to wait does so in its ring, and those after it do, too. So nothing of it is in flight: a
 * queue can be stopped, moved or taken over at any time without waiting for its limit. A queue has paid for
 * one request at most that has not begun, so queues that draw on the same limits take turns.
 */
#ifndef VHOST_THROTTLE_H
#define VHOST_THROTTLE_H

#include <stdbool.h>
#include <stdint.h>

#include "bdev/qos.h"
#include "reactor/reactor.h"

struct vq_chain;

/* No limit while it is all zeroes. */
struct throttle {
	struct reactor *reactor;
	struct poller *poller;	   /* takes the requests */
	struct qos_limits *limits; /* NULL: none */
	uint64_t ticket;	   /* ticks: when the next request may begin; 0: it has not been charged */
	struct timer timer;	   /* set: nothing may begin before */
};

/* What of a chain is no data: the least that is readable and writable. */
struct throttle_frame {
	uint32_t header;   /* bytes; 0: requests of such a queue are not limited */
	uint32_t response; /* bytes */
};

/*
 * Draw on the limits in @fd, which stays the caller's, from now on; -1: on none. What waits has another look.
 * 0; -errno, and then all is as before.
 */
int throttle_set(struct throttle *throttle, struct reactor *reactor, struct poller *poller, int fd);
/*
 * May the next request of the ring begin? Asked again once the time that it waits for has come, which wakes
 * the poller. A request without data always may.
 */
bool throttle_admits(struct throttle *throttle, const struct throttle_frame *frame,
		     const struct vq_chain *chain);
/* Unmap the limits. */
void throttle_end(struct throttle *throttle);

/* Does the next request wait for its time? */
static inline bool throttle_holds(const struct throttle *throttle)
{
	return throttle->timer.place != 0;
}

#endif
