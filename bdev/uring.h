/*
 * One io_uring of a reactor: operations queued during a turn are submitted together at its end, and their
 * completions are reaped by a poller. What is asked for and what comes back is plain; that it is io_uring
 * which does it stays in uring.c.
 */
#ifndef BDEV_URING_H
#define BDEV_URING_H

#include <stddef.h>
#include <stdint.h>

#include "reactor/reactor.h"

/* cffi: begin */
/* 0, or -errno with which a process like this one cannot have an io_uring. */
int uring_probe(void);
/*
 * Have every ring that is made from now on hold the open file behind @fd (-1: none), which stays the caller's,
 * for as long as anything submitted to it can still happen: reactor/presence.py.
 */
void uring_hold(int fd);
/* cffi: end */

enum uring_code {
	URING_READ,
	URING_WRITE,
	URING_READV,
	URING_WRITEV,
	URING_FSYNC,
	URING_FALLOCATE,
};

/* A file, known to the ring under an index where the table of registered files had room. */
struct uring_file {
	int fd;
	int index; /* -1: not registered */
};

struct uring_op {
	/* Called once, in a later turn or later in this one, with what the system call would return or -errno.
	 */
	void (*done)(struct uring_op *op, int result);
	const struct uring_file *file;
	const void *address; /* bytes, or struct iovec for READV and WRITEV; they stay until done() */
	uint64_t offset;
	uint64_t length; /* bytes, or how many iovecs */
	uint32_t flags;	 /* RWF_*, IORING_FSYNC_*, or the mode of fallocate() */
	enum uring_code code;
};

struct uring;

/*
 * @depth: a power of two; no more operations than that are ever under way, which its user sees to.
 * NULL and errno: ENOSYS or EPERM where the system has io_uring switched off.
 */
struct uring *uring_create(struct reactor *reactor, uint32_t depth);
/* Nothing may be under way. */
void uring_destroy(struct uring *uring);

/*
 * The descriptor of a file that is locked, by flock(), for as long as anything submitted to this ring can still
 * happen, also after the death of this process. It stays the ring's.
 */
int uring_fence(const struct uring *uring);

void uring_add_file(struct uring *uring, struct uring_file *file, int fd);
void uring_remove_file(struct uring *uring, struct uring_file *file);

/*
 * Have READ and WRITE reach this memory as a registered buffer, wherever all of an operation's memory lies in
 * one; see buffers_add(). Nothing on it may be under way when it is removed.
 */
int uring_add_buffer(struct uring *uring, void *address, size_t size);
int uring_remove_buffer(struct uring *uring, const void *address);
/* How many operations have used one. */
uint64_t uring_buffer_uses(const struct uring *uring);

void uring_queue(struct uring *uring, struct uring_op *op);

#endif
