/*
 * How operations on files reach the kernel: io_uring where it is allowed (uring.c), else Linux AIO (aio.c),
 * else threads that block (io_threads.c). What is asked for and what comes back is the same; transfer.c has one
 * of each kind that its files need.
 */
#ifndef BDEV_KERNEL_IO_H
#define BDEV_KERNEL_IO_H

#include <stddef.h>
#include <stdint.h>

#include "reactor/reactor.h"

/* cffi: begin */
enum kernel_io_kind {
	KERNEL_IO_URING,
	KERNEL_IO_AIO, /* only for files with O_DIRECT: others would block their submitter */
	KERNEL_IO_THREADS,
	KERNEL_IO_KINDS,
};
/* cffi: end */

enum file_code {
	FILE_READ,
	FILE_WRITE,
	FILE_READV,
	FILE_WRITEV,
	FILE_FDATASYNC,
	FILE_FALLOCATE,
};

struct io_file {
	int fd;
	int index; /* under which an io_uring has registered it; -1: not */
};

struct file_op {
	/* Called once, in a later turn or later in this one, with what the system call would return or -errno.
	 */
	void (*done)(struct file_op *op, int result);
	const struct io_file *file;
	const void *address; /* bytes, or struct iovec for READV and WRITEV; they stay until done() */
	uint64_t offset;
	uint64_t length; /* bytes, or how many iovecs */
	uint32_t flags;	 /* RWF_*, or the mode of fallocate() */
	enum file_code code;
	/* For the one that carries it out. */
	int result;
	struct file_op *next;
};

struct kernel_io;

struct kernel_io_ops {
	/* Nothing may be under way. */
	void (*destroy)(struct kernel_io *io);
	void (*queue)(struct kernel_io *io, struct file_op *op);
	/* Try to end an operation that was queued, which then is done() with -ECANCELED or -EINTR. 0 or -errno.
	 */
	int (*cancel)(struct kernel_io *io, struct file_op *op);
	/* These may be NULL: files are reached by their descriptors, memory by its addresses. */
	void (*add_file)(struct kernel_io *io, struct io_file *file);
	void (*remove_file)(struct kernel_io *io, struct io_file *file);
	/* Have READ and WRITE reach this memory as a registered buffer: see buffers_add(). */
	int (*add_buffer)(struct kernel_io *io, void *address, size_t size);
	/* Nothing on it may be under way. */
	int (*remove_buffer)(struct kernel_io *io, const void *address);
	/* How many operations have used one. */
	uint64_t (*buffer_uses)(const struct kernel_io *io);
};

struct kernel_io {
	const struct kernel_io_ops *ops;
};

/*
 * @depth: a power of two; no more operations than that are ever under way, which its user sees to. Each holds a
 * lock on
 * @fence (bdev/fence.h) for as long as anything submitted to it can still happen, also after the death of this
 * process. NULL and errno: ENOSYS or EPERM where the system does not allow it.
 */
struct kernel_io *uring_create(struct reactor *reactor, uint32_t depth, int fence);
struct kernel_io *aio_create(struct reactor *reactor, uint32_t depth, int fence);
struct kernel_io *io_threads_create(struct reactor *reactor, uint32_t depth, int fence);

#endif
