/*
 * Operations queued during a turn are submitted together at its end. While hot, the poller looks at the
 * context's ring, which the kernel maps for us, and asks for events when there are any; each completion also
 * signals an eventfd that stands in the reactor's epoll set, for when it sleeps.
 *
 * fdatasync() and fallocate() are threads' work: AIO has no fallocate(), and some file systems no fsync.
 */
#include "bdev/aio.h"

#include <errno.h>
#include <linux/aio_abi.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bdev/fence.h"

#define BATCH 64 /* events a turn, operations a submission */

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

/* What stands at the address of a context: fs/aio.c, unchanged since 2.6, as every user of it relies on. */
struct ring {
	uint32_t id;
	uint32_t count;
	uint32_t head; /* ours */
	uint32_t tail; /* the kernel's */
};

struct request {
	struct iocb iocb;
	struct file_op *op;
	struct request *next; /* free, or to be submitted */
};

struct aio {
	struct kernel_io io; /* first */
	struct reactor *reactor;
	struct poller poller;
	struct deferred flush;
	struct fd_watch watch;
	aio_context_t context;
	struct kernel_io *threads;
	void *fence;
	struct request *free;
	struct request *queued, **queued_end;
	struct request requests[];
};

static int set_up(unsigned depth, aio_context_t *context)
{
	return syscall(SYS_io_setup, depth, context) < 0 ? -errno : 0;
}

int aio_probe(void)
{
	aio_context_t context = 0;
	int rc = set_up(1, &context);

	if (rc == 0) {
		syscall(SYS_io_destroy, context);
	}
	return rc;
}

static const uint16_t opcodes[] = {
    [FILE_READ] = IOCB_CMD_PREAD,
    [FILE_WRITE] = IOCB_CMD_PWRITE,
    [FILE_READV] = IOCB_CMD_PREADV,
    [FILE_WRITEV] = IOCB_CMD_PWRITEV,
};

static void aio_queue(struct kernel_io *io, struct file_op *op)
{
	struct aio *aio = (struct aio *)io;
	struct request *request = aio->free;

	if (op->code == FILE_FDATASYNC || op->code == FILE_FALLOCATE) {
		aio->threads->ops->queue(aio->threads, op);
		return;
	}
	aio->free = request->next; /* no more operations are under way than there are requests */
	request->op = op;
	request->next = NULL;
	request->iocb = (struct iocb){
	    .aio_data = (uintptr_t)request,
	    .aio_lio_opcode = opcodes[op->code],
	    .aio_fildes = (uint32_t)op->file->fd,
	    .aio_buf = (uintptr_t)op->address,
	    .aio_nbytes = op->length,
	    .aio_offset = (int64_t)op->offset,
	    .aio_rw_flags = (int)op->flags,
	    .aio_flags = IOCB_FLAG_RESFD,
	    .aio_resfd = (uint32_t)aio->watch.fd,
	};
	*aio->queued_end = request;
	aio->queued_end = &request->next;
	reactor_defer(aio->reactor, &aio->flush);
}

static void request_done(struct aio *aio, struct request *request, int64_t result)
{
	struct file_op *op = request->op;

	request->next = aio->free;
	aio->free = request;
	op->done(op, (int)result);
}

/* Forget the oldest @count that are queued. */
static void dequeue(struct aio *aio, unsigned count)
{
	while (count--) {
		aio->queued = aio->queued->next;
	}
	if (!aio->queued) {
		aio->queued_end = &aio->queued;
	}
}

static void flush(struct deferred *deferred)
{
	struct aio *aio = container_of(deferred, struct aio, flush);

	while (aio->queued) {
		struct iocb *iocbs[BATCH];
		struct request *first = aio->queued;
		unsigned count = 0;
		long taken;

		for (struct request *at = first; at && count < BATCH; at = at->next) {
			iocbs[count++] = &at->iocb;
		}
		taken = syscall(SYS_io_submit, aio->context, (long)count, iocbs);
		if (taken < 0 && (errno == EAGAIN || errno == EINTR)) {
			break; /* the poller tries again */
		}
		dequeue(aio, taken < 0 ? 1 : (unsigned)taken);
		if (taken < 0) {
			request_done(aio, first, -errno); /* the error is that of the first */
		}
	}
	poller_wake(&aio->poller);
}

/* io_cancel() knows of no operation on disks; what threads have not begun they give back. */
static int aio_cancel(struct kernel_io *io, struct file_op *op)
{
	struct kernel_io *threads = ((struct aio *)io)->threads;

	return threads->ops->cancel(threads, op);
}

static bool has_events(const struct aio *aio)
{
	const struct ring *ring = (const struct ring *)(uintptr_t)aio->context;

	return __atomic_load_n(&ring->head, __ATOMIC_RELAXED) != __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE);
}

static int run(struct poller *poller)
{
	struct aio *aio = container_of(poller, struct aio, poller);
	struct io_event events[BATCH];
	struct timespec none = {0};
	long count;

	if (aio->queued) {
		reactor_defer(aio->reactor, &aio->flush);
	}
	if (!has_events(aio)) {
		return aio->queued ? 1 : 0;
	}
	count = syscall(SYS_io_getevents, aio->context, 1L, (long)BATCH, events, &none);
	for (long i = 0; i < count; i++) {
		request_done(aio, (struct request *)(uintptr_t)events[i].data, events[i].res);
	}
	return count > 0 ? (int)count : 0;
}

/* The eventfd is always signalled: nothing has to be armed. */
static int sleep_until_signalled(struct poller *poller)
{
	const struct aio *aio = container_of(poller, struct aio, poller);

	return has_events(aio) || aio->queued;
}

static void signalled(struct fd_watch *watch)
{
	poller_wake(&container_of(watch, struct aio, watch)->poller);
}

static void release(struct aio *aio)
{
	if (aio->threads) {
		aio->threads->ops->destroy(aio->threads);
	}
	if (aio->watch.fd >= 0) {
		close(aio->watch.fd);
	}
	if (aio->context) {
		syscall(SYS_io_destroy, aio->context);
	}
	if (aio->fence) {
		fence_unmap(aio->fence);
	}
	free(aio);
}

static void aio_destroy(struct kernel_io *io)
{
	struct aio *aio = (struct aio *)io;

	poller_stop(&aio->poller);
	reactor_cancel(aio->reactor, &aio->flush);
	close(fd_watch_stop(aio->reactor, &aio->watch));
	release(aio);
}

static const struct kernel_io_ops aio_ops = {
    .destroy = aio_destroy,
    .queue = aio_queue,
    .cancel = aio_cancel,
};

static int make(struct aio *aio, struct reactor *reactor, uint32_t depth, int fence)
{
	int rc = set_up(depth, &aio->context);

	if (rc) {
		return rc;
	}
	aio->fence = fence_map(fence);
	if (!aio->fence) {
		return -errno;
	}
	aio->watch = (struct fd_watch){.ready = signalled, .fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
	if (aio->watch.fd < 0) {
		return -errno;
	}
	aio->threads = io_threads_create(reactor, depth, fence);
	return aio->threads ? fd_watch_start(reactor, &aio->watch) : -errno;
}

struct kernel_io *aio_create(struct reactor *reactor, uint32_t depth, int fence)
{
	struct aio *aio = calloc(1, sizeof(*aio) + depth * sizeof(struct request));
	int rc;

	if (!aio) {
		return NULL;
	}
	aio->io.ops = &aio_ops;
	aio->reactor = reactor;
	aio->watch.fd = -1;
	aio->flush.run = flush;
	aio->queued_end = &aio->queued;
	for (uint32_t i = 0; i < depth; i++) {
		aio->requests[i].next = aio->free;
		aio->free = &aio->requests[i];
	}
	rc = make(aio, reactor, depth, fence);
	if (rc) {
		release(aio);
		errno = -rc;
		return NULL;
	}
	aio->poller = (struct poller){.run = run, .sleep = sleep_until_signalled};
	poller_start(reactor, &aio->poller);
	return &aio->io;
}
