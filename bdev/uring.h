/*
 * One io_uring of a reactor: operations queued during a turn are submitted together at its end, and their
 * completions are reaped by a poller. See bdev/kernel_io.h for what it is to others.
 */
#ifndef BDEV_URING_H
#define BDEV_URING_H

#include "bdev/kernel_io.h"

/* cffi: begin */
/* 0, or -errno with which a process like this one cannot have an io_uring. */
int uring_probe(void);
/*
 * Have every ring that is made from now on hold the open file behind @fd (-1: none), which stays the caller's,
 * for as long as anything submitted to it can still happen: reactor/presence.py.
 */
void uring_hold(int fd);
/* cffi: end */

#endif
