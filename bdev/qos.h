/*
 * Limits on what a device carries out a second: all reactors that serve it draw on the same ones, in shared
 * memory.
 *
 * A limit is a point in time, `next`, before which nothing may start. What starts moves it on by what it costs:
 * the time that it may take at that rate. So there is no least rate and no largest request: a large one is
 * followed by a long wait. Time that was not used is lost but for a little, which makes up for late timers.
 * Nothing is locked or owned: a reactor that dies holds nobody up.
 */
#ifndef BDEV_QOS_H
#define BDEV_QOS_H

#include <stdbool.h>
#include <stdint.h>

#include "bdev/bdev.h"

/* cffi: begin */
enum qos_limit_kind {
	QOS_RW_IOS,
	QOS_RW_BYTES,
	QOS_R_BYTES,
	QOS_W_BYTES,
	QOS_LIMITS,
};

struct qos_limit {
	uint64_t rate; /* a second; 0: no limit. Written by the control process */
	uint64_t next; /* ticks; moved on by reactors */
};

struct qos_limits {
	struct qos_limit limit[4]; /* by enum qos_limit_kind */
};

struct bdev_qos;

/*
 * Put limits on an open handle, instead of those it has. @fd: of a struct qos_limits, stays the caller's; -1
 * takes all limits away. 0 or -errno.
 */
int bdev_set_qos(struct bdev *bdev, int fd);
/* Limits that were lifted or raised: those that wait have another look. */
void bdev_qos_changed(struct bdev *bdev);
/* cffi: end */

/* For bdev.c: start @io now, or when the limits allow. */
void qos_submit(struct bdev_qos *qos, struct bdev_io *io);
/* Fail what waits with @status. */
void qos_fail_waiting(struct bdev_qos *qos, int status);
/* As bdev_cancel(). */
void qos_cancel(struct bdev_qos *qos, bool (*mine)(const struct bdev_io *io, const void *whose),
		const void *whose);
void qos_free(struct bdev_qos *qos);

#endif
