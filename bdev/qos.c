#include "bdev/qos.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "bdev/detour.h"

#define SLACK_NS 10000000 /* of unused time that is kept: 1 % of a second */

#define OP(op) (1U << (op))
#define LIMITED (OP(BDEV_READ) | OP(BDEV_WRITE))

struct bdev_qos {
	struct bdev *bdev;
	struct qos_limits *shared;
	struct bdev_io *waiting, **end;
	struct timer timer;
	uint64_t tick_rate;
	uint64_t slack;
};

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

/* How much of a limit a request takes. */
static uint64_t units(unsigned kind, const struct bdev_io *io)
{
	switch (kind) {
	case QOS_RW_IOS:
		return 1;
	case QOS_RW_BYTES:
		return io->length;
	case QOS_R_BYTES:
		return io->op == BDEV_READ ? io->length : 0;
	default:
		return io->op == BDEV_WRITE ? io->length : 0;
	}
}

/* When @io may start: @now, or the latest point of time that one of its limits says. */
static uint64_t start_time(const struct bdev_qos *qos, const struct bdev_io *io, uint64_t now)
{
	uint64_t start = now;

	for (unsigned kind = 0; kind < QOS_LIMITS; kind++) {
		const struct qos_limit *limit = &qos->shared->limit[kind];
		uint64_t next = __atomic_load_n(&limit->next, __ATOMIC_RELAXED);

		if (__atomic_load_n(&limit->rate, __ATOMIC_RELAXED) && next > start && units(kind, io)) {
			start = next;
		}
	}
	return start;
}

/* Move the limits on by what @io costs. Reactors that charge at the same time are all counted. */
static void charge(struct bdev_qos *qos, const struct bdev_io *io, uint64_t now)
{
	for (unsigned kind = 0; kind < QOS_LIMITS; kind++) {
		struct qos_limit *limit = &qos->shared->limit[kind];
		uint64_t rate = __atomic_load_n(&limit->rate, __ATOMIC_RELAXED);
		uint64_t old = __atomic_load_n(&limit->next, __ATOMIC_RELAXED), next, cost;

		if (!rate) {
			continue;
		}
		cost = (uint64_t)((unsigned __int128)units(kind, io) * qos->tick_rate / rate);
		do {
			next = (old + qos->slack > now ? old : now - qos->slack) + cost;
		} while (!__atomic_compare_exchange_n(&limit->next, &old, next, true, __ATOMIC_RELAXED,
						      __ATOMIC_RELAXED));
	}
}

/* Start those that may; a timer for the first that may not. */
static void start_waiting(struct bdev_qos *qos)
{
	uint64_t now = reactor_ticks();

	while (qos->waiting) {
		struct bdev_io *io = qos->waiting;
		uint64_t start = start_time(qos, io, now);

		if (start > now && !timer_set(qos->bdev->reactor, &qos->timer, start)) {
			return;
		}
		/* Without memory for a timer it is not held back for ever, but goes. */
		qos->waiting = io->next;
		if (!qos->waiting) {
			qos->end = &qos->waiting;
		}
		charge(qos, io, now);
		detour_past_limits(io);
	}
}

static void fire(struct timer *timer)
{
	start_waiting(container_of(timer, struct bdev_qos, timer));
}

void qos_submit(struct bdev_qos *qos, struct bdev_io *io)
{
	bool first = !qos->waiting;

	if (!(OP(io->op) & LIMITED)) {
		detour_past_limits(io);
		return;
	}
	io->next = NULL;
	*qos->end = io;
	qos->end = &io->next;
	if (first) {
		start_waiting(qos);
	}
}

void qos_fail_waiting(struct bdev_qos *qos, int status)
{
	struct bdev_io *io = qos->waiting;

	timer_clear(qos->bdev->reactor, &qos->timer);
	qos->waiting = NULL;
	qos->end = &qos->waiting;
	while (io) {
		struct bdev_io *next = io->next;

		bdev_complete(io, status);
		io = next;
	}
}

void qos_free(struct bdev_qos *qos)
{
	if (qos) {
		timer_clear(qos->bdev->reactor, &qos->timer);
		munmap(qos->shared, sizeof(*qos->shared));
		free(qos);
	}
}

static struct bdev_qos *qos_create(struct bdev *bdev, int fd)
{
	struct bdev_qos *qos = calloc(1, sizeof(*qos));

	if (!qos) {
		return NULL;
	}
	qos->shared = mmap(NULL, sizeof(*qos->shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (qos->shared == MAP_FAILED) {
		int error = errno;

		free(qos);
		errno = error;
		return NULL;
	}
	qos->bdev = bdev;
	qos->end = &qos->waiting;
	qos->timer.fire = fire;
	qos->tick_rate = reactor_tick_rate();
	qos->slack = reactor_ns_to_ticks(SLACK_NS);
	return qos;
}

int bdev_set_qos(struct bdev *bdev, int fd)
{
	struct bdev_qos *old = bdev->qos, *qos = NULL;
	struct bdev_io *io = NULL;

	if (fd >= 0) {
		qos = qos_create(bdev, fd);
		if (!qos) {
			return -errno;
		}
	}
	bdev->qos = qos;
	detour_update(bdev);
	if (old) {
		io = old->waiting;
		qos_free(old);
	}
	while (io) { /* in their order, under the new limits */
		struct bdev_io *next = io->next;

		if (qos) {
			qos_submit(qos, io);
		} else {
			detour_past_limits(io);
		}
		io = next;
	}
	return 0;
}

void bdev_qos_changed(struct bdev *bdev)
{
	if (bdev->qos) {
		start_waiting(bdev->qos);
	}
}
