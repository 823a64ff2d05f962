/*
 * Limits on what a device carries out a second, and on what a group of devices does: all reactors that serve
 * them draw on the same ones, in shared memory.
 *
 * A limit is a point in time, `next`, before which nothing may start. What is to start moves it on by what it
 * costs: the time that it may take at that rate. So there is no least rate and no largest request: a large one
 * is followed by a long wait. Time that was not used is lost but for `slack`: a little, which makes up for late
 * timers, or as much as the allowed burst is worth. Nothing is locked or owned: a reactor that dies holds
 * nobody up.
 *
 * The members of a group share it fairly: each has a clock that runs at its share of the group's rate, one part
 * for each member that has lately asked. A member whose clock is behind may take the next place in the group's
 * time; one that is ahead only when nobody has taken it.
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

#define QOS_SLACK_NS 10000000	 /* that every limit keeps: 1 % of a second */
#define QOS_MEMBERS 64		 /* of a group */
#define QOS_RECENT_NS 50000000	 /* who has asked in this time counts as active */
#define QOS_ARREARS_NS 100000000 /* of its share that a member can catch up on */

struct qos_limit {
	uint64_t
	    cost; /* of a unit: ticks, times 2^32; 0: no limit. Written by the control process, and so is: */
	uint64_t slack; /* ticks of unused time that are kept */
	uint64_t next;	/* ticks; moved on by reactors */
};

struct qos_limits {
	struct qos_limit limit[4]; /* by enum qos_limit_kind */
};

struct qos_member {
	uint64_t asked; /* ticks: last */
	uint64_t clock; /* ticks up to which it has had its share */
};

struct qos_group {
	struct qos_limits limits;
	struct qos_member member[64];
};

struct bdev_qos;

/*
 * Put limits on an open handle: its own (of a struct qos_limits), or those of a group (of a struct qos_group)
 * of which it is a member. @fd stays the caller's; -1 takes them away. 0 or -errno.
 */
int bdev_set_qos(struct bdev *bdev, int fd);
int bdev_set_qos_group(struct bdev *bdev, int fd, uint32_t member);
/* Limits that were lifted or raised: those that wait have another look. */
void bdev_qos_changed(struct bdev *bdev);

/*
 * When may a request start that would start @now? Returns the time, for which everything was charged; or, with
 * *again, when to ask again. @limits and @group may be NULL.
 */
uint64_t qos_reserve(struct qos_limits *limits, struct qos_group *group, uint32_t member, uint32_t op,
		     uint64_t length, uint64_t now, bool *again);
/* cffi: end */

/* For detour.c: detour_past_limits() follows, now or when the limits allow. */
void qos_submit(struct bdev_qos *qos, struct bdev_io *io);
/* End one that waits, with -ECANCELED: 0, or -ENOTSUP if it does not wait. */
int qos_abort(struct bdev_qos *qos, struct bdev_io *io);
/* Fail what waits with @status. */
void qos_fail_waiting(struct bdev_qos *qos, int status);
void qos_free(struct bdev_qos *qos);

#endif
