/*
 * Threads that block in the kernel in place of the reactor: the last resort, and what Linux AIO has done that
 * it cannot.
 *
 * What is queued during a turn is handed over at its end, under a mutex that is held for as long as it takes to
 * take an operation out of a list. What is done goes to a stack that the reactor empties as a whole; whoever
 * puts something onto an empty one signals an eventfd.
 *
 * Threads are not on the reactor's CPU: it may never sleep.
 */
#include "bdev/kernel_io.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include "bdev/fence.h"

#define THREADS 8
#define STACK_SIZE (64 << 10)

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

struct list {
	struct file_op *first, **end;
};

struct io_threads {
	struct kernel_io io; /* first */
	struct reactor *reactor;
	struct deferred flush;
	struct fd_watch watch;
	struct list queued; /* in this turn */
	void *fence;
	pthread_mutex_t lock;
	pthread_cond_t wanted;
	struct list asked; /* under the lock, as the next one */
	bool ending;
	struct file_op *done; /* a stack, shared without the lock */
	unsigned count;
	pthread_t threads[THREADS];
};

static void append(struct list *list, struct file_op *op)
{
	op->next = NULL;
	*list->end = op;
	list->end = &op->next;
}

static void clear(struct list *list)
{
	list->first = NULL;
	list->end = &list->first;
}

/* --- in threads -------------------------------------------------------------------------------------- */

static ssize_t carry_out(const struct file_op *op)
{
	const struct iovec one = {.iov_base = (void *)op->address, .iov_len = op->length};
	int fd = op->file->fd;

	switch (op->code) {
	case FILE_READ:
		return preadv2(fd, &one, 1, (off_t)op->offset, (int)op->flags);
	case FILE_READV:
		return preadv2(fd, op->address, (int)op->length, (off_t)op->offset, (int)op->flags);
	case FILE_WRITE:
		return pwritev2(fd, &one, 1, (off_t)op->offset, (int)op->flags);
	case FILE_WRITEV:
		return pwritev2(fd, op->address, (int)op->length, (off_t)op->offset, (int)op->flags);
	case FILE_FDATASYNC:
		return fdatasync(fd);
	case FILE_FALLOCATE:
		return fallocate(fd, (int)op->flags, (off_t)op->offset, (off_t)op->length);
	}
	errno = EOPNOTSUPP;
	return -1;
}

static void tell(struct io_threads *pool, struct file_op *op)
{
	static const uint64_t one = 1;
	struct file_op *top = __atomic_load_n(&pool->done, __ATOMIC_RELAXED);

	do {
		op->next = top;
	} while (!__atomic_compare_exchange_n(&pool->done, &top, op, true, __ATOMIC_RELEASE, __ATOMIC_RELAXED));
	/* @op may be gone from here on, but not the pool: it is not destroyed while we run. */
	if (!top) {
		(void)!write(pool->watch.fd, &one, sizeof(one));
	}
}

static struct file_op *take(struct io_threads *pool)
{
	struct file_op *op;

	pthread_mutex_lock(&pool->lock);
	while (!pool->asked.first && !pool->ending) {
		pthread_cond_wait(&pool->wanted, &pool->lock);
	}
	op = pool->asked.first;
	if (op) {
		pool->asked.first = op->next;
		if (!op->next) {
			clear(&pool->asked);
		}
	}
	pthread_mutex_unlock(&pool->lock);
	return op;
}

static void *work(void *argument)
{
	struct io_threads *pool = argument;
	struct file_op *op;

	while ((op = take(pool)) != NULL) {
		ssize_t result = carry_out(op);

		op->result = result < 0 ? -errno : (int)result;
		tell(pool, op);
	}
	return NULL;
}

/* --- in the reactor ---------------------------------------------------------------------------------- */

static void io_threads_queue(struct kernel_io *io, struct file_op *op)
{
	struct io_threads *pool = (struct io_threads *)io;

	append(&pool->queued, op);
	reactor_defer(pool->reactor, &pool->flush);
}

static void flush(struct deferred *deferred)
{
	struct io_threads *pool = container_of(deferred, struct io_threads, flush);

	if (!pool->queued.first) {
		return;
	}
	pthread_mutex_lock(&pool->lock);
	*pool->asked.end = pool->queued.first;
	pool->asked.end = pool->queued.end;
	pthread_mutex_unlock(&pool->lock);
	if (pool->queued.first->next) {
		pthread_cond_broadcast(&pool->wanted);
	} else {
		pthread_cond_signal(&pool->wanted);
	}
	clear(&pool->queued);
}

static bool unlink_op(struct list *list, const struct file_op *op)
{
	for (struct file_op **link = &list->first; *link; link = &(*link)->next) {
		if (*link == op) {
			*link = op->next;
			if (!op->next) {
				list->end = link;
			}
			return true;
		}
	}
	return false;
}

/* What a thread is at cannot be taken back from it. */
static int io_threads_cancel(struct kernel_io *io, struct file_op *op)
{
	struct io_threads *pool = (struct io_threads *)io;
	bool found = unlink_op(&pool->queued, op);

	if (!found) {
		pthread_mutex_lock(&pool->lock);
		found = unlink_op(&pool->asked, op);
		pthread_mutex_unlock(&pool->lock);
	}
	if (!found) {
		return -ENOENT;
	}
	op->result = -ECANCELED;
	tell(pool, op);
	return 0;
}

static void ready(struct fd_watch *watch)
{
	struct io_threads *pool = container_of(watch, struct io_threads, watch);
	struct file_op *done = __atomic_exchange_n(&pool->done, NULL, __ATOMIC_ACQUIRE);
	struct file_op *first = NULL;

	while (done) { /* the oldest is the last of the stack */
		struct file_op *next = done->next;

		done->next = first;
		first = done;
		done = next;
	}
	while (first) {
		struct file_op *op = first;

		first = op->next;
		op->done(op, op->result);
	}
}

static void end_threads(struct io_threads *pool)
{
	pthread_mutex_lock(&pool->lock);
	pool->ending = true;
	pthread_mutex_unlock(&pool->lock);
	pthread_cond_broadcast(&pool->wanted);
	while (pool->count) {
		pthread_join(pool->threads[--pool->count], NULL);
	}
}

static void io_threads_destroy(struct kernel_io *io)
{
	struct io_threads *pool = (struct io_threads *)io;

	end_threads(pool);
	reactor_cancel(pool->reactor, &pool->flush);
	close(fd_watch_stop(pool->reactor, &pool->watch));
	pthread_cond_destroy(&pool->wanted);
	pthread_mutex_destroy(&pool->lock);
	fence_unmap(pool->fence);
	free(pool);
}

static const struct kernel_io_ops io_threads_ops = {
    .destroy = io_threads_destroy,
    .queue = io_threads_queue,
    .cancel = io_threads_cancel,
};

/* On any CPU that the system lets us have, and with all signals left to the reactor. */
static int start_threads(struct io_threads *pool)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	cpu_set_t cpus;
	int rc = 0;

	CPU_ZERO(&cpus);
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		CPU_SET(cpu, &cpus);
	}
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_SIZE + PTHREAD_STACK_MIN);
	pthread_attr_setaffinity_np(&attributes, sizeof(cpus), &cpus);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	while (!rc && pool->count < THREADS) {
		rc = -pthread_create(&pool->threads[pool->count], &attributes, work, pool);
		if (!rc) {
			pthread_setname_np(pool->threads[pool->count++], "file-io");
		}
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	return rc;
}

struct kernel_io *io_threads_create(struct reactor *reactor, uint32_t depth, int fence)
{
	struct io_threads *pool = calloc(1, sizeof(*pool));
	int rc;

	(void)depth; /* lists have no end */
	if (!pool) {
		return NULL;
	}
	pool->io.ops = &io_threads_ops;
	pool->reactor = reactor;
	pool->flush.run = flush;
	clear(&pool->queued);
	clear(&pool->asked);
	pool->fence = fence_map(fence);
	if (!pool->fence) {
		rc = -errno;
		goto no_fence;
	}
	pool->watch = (struct fd_watch){.ready = ready, .fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
	if (pool->watch.fd < 0) {
		rc = -errno;
		goto no_eventfd;
	}
	rc = fd_watch_start(reactor, &pool->watch);
	if (rc) {
		goto no_watch;
	}
	pthread_mutex_init(&pool->lock, NULL);
	pthread_cond_init(&pool->wanted, NULL);
	rc = start_threads(pool);
	if (rc) {
		io_threads_destroy(&pool->io);
		errno = -rc;
		return NULL;
	}
	return &pool->io;
no_watch:
	close(pool->watch.fd);
no_eventfd:
	fence_unmap(pool->fence);
no_fence:
	free(pool);
	errno = -rc;
	return NULL;
}
