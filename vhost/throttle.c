#include "vhost/throttle.h"

#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>

#include "vhost/virtqueue.h"

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

static void fire(struct timer *timer)
{
	poller_wake(container_of(timer, struct throttle, timer)->poller);
}

static void unmap(struct qos_limits *limits)
{
	if (limits != NULL) {
		munmap(limits, sizeof(*limits));
	}
}

int throttle_set(struct throttle *throttle, struct reactor *reactor, struct poller *poller, int fd)
{
	struct qos_limits *limits = NULL;
	bool held = throttle_holds(throttle);

	if (fd >= 0) {
		limits = mmap(NULL, sizeof(*limits), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (limits == MAP_FAILED) {
			return -errno;
		}
	}
	unmap(throttle->limits);
	throttle->reactor = reactor;
	throttle->poller = poller;
	throttle->limits = limits;
	throttle->timer.fire = fire;
	throttle->ticket = 0; /* its time was that of the old limits */
	if (held) {
		timer_clear(reactor, &throttle->timer);
		poller_wake(poller);
	}
	return 0;
}

static uint64_t beyond(uint64_t bytes, uint32_t frame)
{
	return bytes > frame ? bytes - frame : 0;
}

bool throttle_admits(struct throttle *throttle, const struct throttle_frame *frame,
		     const struct vq_chain *chain)
{
	uint64_t out = beyond(chain->readable_bytes, frame->header);
	uint64_t in = beyond(chain->writable_bytes, frame->response);
	uint64_t now = reactor_now(throttle->reactor);

	if (frame->header == 0 || (out | in) == 0) {
		return true;
	}
	if (throttle->ticket == 0) {
		bool again; /* only of groups */

		throttle->ticket = qos_reserve(throttle->limits, NULL, 0, out > 0 ? BDEV_WRITE : BDEV_READ,
					       out + in, now, &again);
	}
	if (throttle->ticket > now) {
		now = reactor_ticks(); /* which is later than when this turn began */
	}
	/* Without memory for a timer it is not held back for ever, but goes. */
	if (throttle->ticket > now && timer_set(throttle->reactor, &throttle->timer, throttle->ticket) == 0) {
		return false;
	}
	throttle->ticket = 0;
	return true;
}

void throttle_end(struct throttle *throttle)
{
	if (throttle_holds(throttle)) {
		timer_clear(throttle->reactor, &throttle->timer);
	}
	unmap(throttle->limits);
	throttle->limits = NULL;
}
