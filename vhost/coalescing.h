/*
 * Interrupt coalescing: a queue that completes much signals its driver less often than it publishes.
 *
 * The rate is measured over windows of 10 ms. While it is over the threshold, at least
 *
 *	delay = delay_base * (rate - threshold) / threshold
 *
 * lies between two signals, yet never more than a window: a driver that waits for its signal submits nothing,
 * so nobody would notice that the rate has fallen. Whatever was held back is signalled by a timer.
 */
#ifndef VHOST_COALESCING_H
#define VHOST_COALESCING_H

#include <stdbool.h>
#include <stdint.h>

#include "reactor/reactor.h"

/* cffi: begin */
#define COALESCING_WINDOW_MS 10

/*
 * 0; -EINVAL for a threshold of less than one request in a window, and for a delay of 2^32 ticks or more.
 */
int coalescing_check(uint32_t delay_base_us, uint32_t iops_threshold);
/* Ticks between two signals, when @requests were counted in a window and the threshold is @threshold of them.
 */
uint64_t coalescing_delay(uint64_t base_ticks, uint64_t threshold, uint64_t requests);
/* cffi: end */

struct virtqueue;

/* Off while it is all zeroes. */
struct coalescing {
	struct virtqueue *vq;
	uint64_t base;	       /* ticks; 0: off */
	uint64_t threshold;    /* requests in a window */
	uint64_t window;       /* ticks */
	uint64_t window_start; /* ticks */
	uint64_t requests;     /* of this window, so far */
	uint64_t delay;	       /* ticks between two signals */
	uint64_t next_signal;  /* ticks: not before then */
	uint32_t span;	       /* entries of the ring published since the driver was last thought of */
	struct timer timer;    /* set: something is held back */
};

/* Begin, change or (@delay_base_us of 0) end it; what is held back is signalled. As coalescing_check(). */
int coalescing_set(struct coalescing *coalescing, struct virtqueue *vq, uint32_t delay_base_us,
		   uint32_t iops_threshold);
/* In place of vq_publish(), while it is on. */
void coalescing_publish(struct coalescing *coalescing);
/* Is a signal held back, should the driver want one? */
static inline bool coalescing_holds(const struct coalescing *coalescing)
{
	return coalescing->timer.place != 0;
}

/* Signal what is held back, now. */
void coalescing_flush(struct coalescing *coalescing);

#endif
