/*
 * Requests of one handle wait in line. The first has a ticket, a time at which it may start and for which it
 * was charged; the others have none yet: so handles that draw on the same limits take turns.
 */
#include "bdev/qos.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "bdev/detour.h"

#define OP(op) (1U << (op))
#define LIMITED (OP(BDEV_READ) | OP(BDEV_WRITE) | OP(BDEV_VERIFY))

struct bdev_qos {
	struct bdev *bdev;
	struct qos_limits *limits; /* NULL without */
	struct qos_group *group;   /* the same */
	uint32_t member;
	uint64_t ticket; /* ticks: when the first may start; 0: it has not been charged */
	struct bdev_io *waiting, **end;
	struct timer timer;
};

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

/* When to go on with the first; *now, or before, if it may start. */
static uint64_t next_time(struct bdev_qos *qos, const struct bdev_io *io, uint64_t now)
{
	uint64_t start;
	bool again;

	if (qos->ticket) {
		return qos->ticket;
	}
	start = qos_reserve(qos->limits, qos->group, qos->member, io->op, io->length, now, &again);
	if (!again) {
		qos->ticket = start;
	}
	return start;
}

/* Start those that may; a timer for the first that may not. */
static void start_waiting(struct bdev_qos *qos)
{
	/* The time of this turn is enough, but for clocks that members on several reactors are judged by. */
	uint64_t now = qos->group ? reactor_ticks() : reactor_now(qos->bdev->reactor);

	while (qos->waiting) {
		struct bdev_io *io = qos->waiting;
		uint64_t start = next_time(qos, io, now);

		if (start > now) {
			now = reactor_ticks(); /* which is later than when this turn began */
		}
		if (start > now && !timer_set(qos->bdev->reactor, &qos->timer, start)) {
			return;
		}
		/* Without memory for a timer it is not held back for ever, but goes. */
		qos->waiting = io->next;
		if (!qos->waiting) {
			qos->end = &qos->waiting;
		}
		qos->ticket = 0;
		detour_past_limits(io);
	}
}

static void fire(struct timer *timer)
{
	start_waiting(container_of(timer, struct bdev_qos, timer));
}

/* Whether a request that nobody is before may go at once, which is what most do. */
static bool starts_now(struct bdev_qos *qos, const struct bdev_io *io)
{
	uint64_t now = qos->group ? reactor_ticks() : reactor_now(qos->bdev->reactor);

	if (next_time(qos, io, now) > now) {
		return false; /* the ticket stays */
	}
	qos->ticket = 0;
	return true;
}

void qos_submit(struct bdev_qos *qos, struct bdev_io *io)
{
	bool first = !qos->waiting;

	if (!(OP(io->op) & LIMITED) || (first && starts_now(qos, io))) {
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

static void complete_all(struct bdev_io *io, int status)
{
	while (io) {
		struct bdev_io *next = io->next;

		bdev_complete(io, status);
		io = next;
	}
}

/* Nobody waits any more; returns who did. */
static struct bdev_io *take_waiting(struct bdev_qos *qos)
{
	struct bdev_io *io = qos->waiting;

	timer_clear(qos->bdev->reactor, &qos->timer);
	qos->ticket = 0;
	qos->waiting = NULL;
	qos->end = &qos->waiting;
	return io;
}

void qos_fail_waiting(struct bdev_qos *qos, int status)
{
	complete_all(take_waiting(qos), status);
}

int qos_abort(struct bdev_qos *qos, struct bdev_io *io)
{
	bool first = qos->waiting == io;

	if (!detour_unlink(&qos->waiting, &qos->end, io)) {
		return -ENOTSUP;
	}
	if (first) {
		timer_clear(qos->bdev->reactor, &qos->timer);
		start_waiting(qos); /* the next one has its ticket */
	}
	bdev_complete(io, -ECANCELED);
	return 0;
}

static void unmap(void *shared, size_t size)
{
	if (shared) {
		munmap(shared, size);
	}
}

void qos_free(struct bdev_qos *qos)
{
	if (qos) {
		timer_clear(qos->bdev->reactor, &qos->timer);
		unmap(qos->limits, sizeof(*qos->limits));
		unmap(qos->group, sizeof(*qos->group));
		free(qos);
	}
}

static struct bdev_qos *get(struct bdev *bdev)
{
	if (!bdev->qos) {
		struct bdev_qos *qos = calloc(1, sizeof(*qos));

		if (!qos) {
			return NULL;
		}
		qos->bdev = bdev;
		qos->end = &qos->waiting;
		qos->timer.fire = fire;
		bdev->qos = qos;
		detour_update(bdev);
	}
	return bdev->qos;
}

/* Have those that wait do so under other limits, in their order; with none left nobody waits. */
static void changed(struct bdev *bdev)
{
	struct bdev_qos *qos = bdev->qos;
	struct bdev_io *io = take_waiting(qos);

	if (!qos->limits && !qos->group) {
		bdev->qos = NULL;
		detour_update(bdev);
		qos_free(qos);
	}
	for (struct bdev_io *next; io; io = next) {
		next = io->next;
		if (bdev->qos) {
			qos_submit(bdev->qos, io);
		} else {
			detour_past_limits(io);
		}
	}
}

/* Map @size bytes of @fd instead of what *@place points at; -1: nothing. 0 or -errno. */
static int replace(void **place, int fd, size_t size)
{
	void *shared = NULL;

	if (fd >= 0) {
		shared = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (shared == MAP_FAILED) {
			return -errno;
		}
	}
	unmap(*place, size);
	*place = shared;
	return 0;
}

int bdev_set_qos(struct bdev *bdev, int fd)
{
	struct bdev_qos *qos = get(bdev);
	void *limits = qos ? qos->limits : NULL;
	int rc = qos ? replace(&limits, fd, sizeof(struct qos_limits)) : -ENOMEM;

	if (qos) {
		qos->limits = limits;
		changed(bdev);
	}
	return rc;
}

int bdev_set_qos_group(struct bdev *bdev, int fd, uint32_t member)
{
	struct bdev_qos *qos = get(bdev);
	void *group = qos ? qos->group : NULL;
	int rc = qos ? replace(&group, fd, sizeof(struct qos_group)) : -ENOMEM;

	if (qos) {
		qos->group = group;
		qos->member = member;
		changed(bdev);
	}
	return rc;
}

void bdev_qos_changed(struct bdev *bdev)
{
	if (bdev->qos) {
		bdev->qos->ticket = 0; /* its time was that of the old limits */
		start_waiting(bdev->qos);
	}
}
