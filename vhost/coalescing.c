#include "vhost/coalescing.h"

#include <errno.h>

#include "vhost/ring.h"

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

#define WINDOW_NS (COALESCING_WINDOW_MS * 1000000ULL)

/* --- the rule --------------------------------------------------------------------------------------- */

static uint64_t window_threshold(uint32_t iops)
{
	return (uint64_t)iops * COALESCING_WINDOW_MS / 1000;
}

int coalescing_check(uint32_t delay_base_us, uint32_t iops_threshold)
{
	uint64_t base = reactor_ns_to_ticks((uint64_t)delay_base_us * 1000);

	return base >= UINT32_MAX || window_threshold(iops_threshold) == 0 ? -EINVAL : 0;
}

uint64_t coalescing_delay(uint64_t base_ticks, uint64_t threshold, uint64_t requests)
{
	const uint64_t longest = reactor_ns_to_ticks(WINDOW_NS);
	uint64_t over, delay;

	if (base_ticks == 0 || requests <= threshold) {
		return 0;
	}
	over = requests - threshold;
	if (over > UINT32_MAX) {
		over = UINT32_MAX; /* base_ticks is under 2^32 */
	}
	delay = base_ticks * over / threshold;
	return delay < longest ? delay : longest;
}

/* A pause that is longer than a window counts by its mean. */
static void measure(struct coalescing *coalescing, uint64_t now)
{
	uint64_t elapsed = now - coalescing->window_start;

	if (elapsed < coalescing->window) {
		return;
	}
	coalescing->delay = coalescing_delay(coalescing->base, coalescing->threshold,
					     coalescing->requests * coalescing->window / elapsed);
	coalescing->requests = 0;
	coalescing->window_start = now;
}

/* --- signalling ------------------------------------------------------------------------------------- */

static void signal_driver(struct coalescing *coalescing, uint64_t now)
{
	timer_clear(coalescing->vq->reactor, &coalescing->timer);
	coalescing->span = 0;
	if (vq_signal(coalescing->vq)) {
		coalescing->next_signal = now + coalescing->delay;
	}
}

static void timer_fired(struct timer *timer)
{
	struct coalescing *coalescing = container_of(timer, struct coalescing, timer);

	signal_driver(coalescing, reactor_now(coalescing->vq->reactor));
}

/*
 * Whether the driver wants a signal is told from what was published since it was last asked, modulo the size of
 * the ring: it has to be asked before that is ambiguous. A split ring's indices have room for another ring.
 */
static bool is_full_turn(struct coalescing *coalescing)
{
	struct virtqueue *vq = coalescing->vq;

	if (coalescing->span < vq->size) {
		return false;
	}
	if (vq->is_packed && vq->event_idx) {
		vq->signalled = false; /* once too often is harmless */
	}
	return true;
}

void coalescing_publish(struct coalescing *coalescing)
{
	struct virtqueue *vq = coalescing->vq;
	uint64_t now = reactor_now(vq->reactor);
	uint32_t entries;
	uint32_t requests = vq_publish_silently(vq, &entries);

	if (requests == 0) {
		return;
	}
	coalescing->requests += requests;
	coalescing->span += entries;
	measure(coalescing, now);
	if (now >= coalescing->next_signal || is_full_turn(coalescing)) {
		signal_driver(coalescing, now);
	} else if (coalescing->timer.place == 0 &&
		   timer_set(vq->reactor, &coalescing->timer, coalescing->next_signal) < 0) {
		signal_driver(coalescing, now);
	}
}

void coalescing_flush(struct coalescing *coalescing)
{
	if (coalescing->timer.place != 0) {
		signal_driver(coalescing, reactor_now(coalescing->vq->reactor));
	}
}

int coalescing_set(struct coalescing *coalescing, struct virtqueue *vq, uint32_t delay_base_us,
		   uint32_t iops_threshold)
{
	int rc = coalescing_check(delay_base_us, iops_threshold);

	if (rc < 0) {
		return rc;
	}
	coalescing_flush(coalescing);
	*coalescing = (struct coalescing){
	    .vq = vq,
	    .base = reactor_ns_to_ticks((uint64_t)delay_base_us * 1000),
	    .threshold = window_threshold(iops_threshold),
	    .window = reactor_ns_to_ticks(WINDOW_NS),
	    .window_start = reactor_now(vq->reactor),
	    .timer.fire = timer_fired,
	};
	return 0;
}
