/*
 * Submission: SQEs gather during a turn and one io_uring_enter() at its end takes them all. No operation is
 * ever refused: no more are under way than the submission queue has entries, and the completion queue has
 * twice as many, so that neither can overflow.
 *
 * Completion: while hot, the poller looks at the completion queue, which is shared memory. Before it sleeps
 * it lets the kernel signal an eventfd that stands in the reactor's epoll set. The signal is switched on
 * and off by a flag in shared memory, without a system call; the eventfd is never read, since every write to
 * it is another edge.
 */
#include "bdev/uring.h"

#include <assert.h>
#include <errno.h>
#include <liburing.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "bdev/buffers.h"
#include "bdev/fence.h"

#define FILES 511 /* registered; further ones work by their descriptors */
#define BATCH 64  /* completions a turn */

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

struct uring {
	struct kernel_io io; /* first */
	struct io_uring ring;
	struct reactor *reactor;
	struct poller poller;
	struct deferred flush;
	struct fd_watch watch;
	bool deferred_work; /* completions are made by io_uring_enter() alone */
	bool complained;
	struct buffers buffers;
	uint16_t free_count;
	uint16_t free_files[FILES]; /* indices */
};

static const uint8_t opcodes[] = {
    [FILE_READ] = IORING_OP_READ,	[FILE_WRITE] = IORING_OP_WRITE,
    [FILE_READV] = IORING_OP_READV,	[FILE_WRITEV] = IORING_OP_WRITEV,
    [FILE_FDATASYNC] = IORING_OP_FSYNC, [FILE_FALLOCATE] = IORING_OP_FALLOCATE,
};

/* Where all of the operation's memory is registered, spare the kernel looking its pages up. */
static void use_buffer(struct uring *uring, const struct file_op *op, struct io_uring_sqe *sqe)
{
	const struct buffer_range *range =
	    buffers_find(&uring->buffers, (uintptr_t)op->address, (size_t)op->length);

	if (range) {
		sqe->opcode = op->code == FILE_READ ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED;
		sqe->buf_index = range->place;
		uring->buffers.used++;
	}
}

static void uring_queue(struct kernel_io *io, struct file_op *op)
{
	struct uring *uring = (struct uring *)io;
	struct io_uring_sqe *sqe = io_uring_get_sqe(&uring->ring);
	bool registered = op->file->index >= 0;

	assert(sqe); /* no more operations are under way than there are entries */
	memset(sqe, 0, sizeof(*sqe));
	sqe->opcode = opcodes[op->code];
	sqe->fd = registered ? op->file->index : op->file->fd;
	sqe->flags = registered ? IOSQE_FIXED_FILE : 0;
	sqe->off = op->offset;
	sqe->user_data = (uintptr_t)op;
	switch (op->code) {
	case FILE_FALLOCATE: /* the length stands where the address does, the mode where the length does */
		sqe->addr = op->length;
		sqe->len = op->flags;
		break;
	case FILE_FDATASYNC:
		sqe->off = 0;
		sqe->fsync_flags = IORING_FSYNC_DATASYNC;
		break;
	default:
		sqe->addr = (uintptr_t)op->address;
		sqe->len = (uint32_t)op->length;
		sqe->rw_flags = (int)op->flags;
		if (op->code == FILE_READ || op->code == FILE_WRITE) {
			use_buffer(uring, op, sqe);
		}
	}
	reactor_defer(uring->reactor, &uring->flush);
}

static void complain(struct uring *uring, int error)
{
	if (!uring->complained) {
		uring->complained = true;
		reactor_notify(uring->reactor, 0, NOTICE_LOG, error, "io_uring_enter: %s; trying on",
			       strerror(-error));
	}
}

static void uring_flush(struct deferred *deferred)
{
	struct uring *uring = container_of(deferred, struct uring, flush);
	int rc =
	    uring->deferred_work ? io_uring_submit_and_get_events(&uring->ring) : io_uring_submit(&uring->ring);

	if (rc < 0 && rc != -EAGAIN && rc != -EBUSY && rc != -EINTR) {
		complain(uring, rc);
	}
	if (io_uring_cq_ready(&uring->ring) || io_uring_sq_ready(&uring->ring)) {
		poller_wake(&uring->poller);
	} else if (!uring->poller.link) {
		/* Asleep and armed. What its spin time is to follow is how long the device takes from here. */
		uring->poller.slept_at = reactor_now(uring->reactor);
	}
}

static int uring_cancel(struct kernel_io *io, struct file_op *op)
{
	struct uring *uring = (struct uring *)io;
	/* What the kernel has handed to the disk it cannot take back: do not wait for that. */
	struct io_uring_sync_cancel_reg cancel = {.addr = (uint64_t)(uintptr_t)op, .fd = -1};

	uring_flush(&uring->flush);
	return io_uring_register_sync_cancel(&uring->ring, &cancel);
}

static int uring_run(struct poller *poller)
{
	struct uring *uring = container_of(poller, struct uring, poller);
	struct io_uring_cqe *cqes[BATCH];
	unsigned count = io_uring_peek_batch_cqe(&uring->ring, cqes, BATCH);

	for (unsigned i = 0; i < count; i++) {
		struct file_op *op = (struct file_op *)(uintptr_t)cqes[i]->user_data;

		op->done(op, cqes[i]->res);
	}
	io_uring_cq_advance(&uring->ring, count);
	if (io_uring_sq_ready(&uring->ring)) {
		reactor_defer(uring->reactor, &uring->flush); /* new ones, or what the kernel would not take */
	}
	return (int)count;
}

static void signal_completions(struct uring *uring, bool on)
{
	io_uring_cq_eventfd_toggle(&uring->ring, on);
}

static int uring_sleep(struct poller *poller)
{
	struct uring *uring = container_of(poller, struct uring, poller);
	const unsigned waits = IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW;

	signal_completions(uring, true);
	/* The kernel completes, then looks whether to signal; we do the reverse. */
	atomic_thread_fence(memory_order_seq_cst);
	if (io_uring_cq_ready(&uring->ring) || io_uring_sq_ready(&uring->ring) ||
	    (*(volatile unsigned *)uring->ring.sq.kflags & waits)) {
		signal_completions(uring, false);
		return 1;
	}
	return 0;
}

static void uring_wake(struct poller *poller)
{
	signal_completions(container_of(poller, struct uring, poller), false);
}

static void uring_ready(struct fd_watch *watch)
{
	poller_wake(&container_of(watch, struct uring, watch)->poller);
}

int uring_probe(void)
{
	struct io_uring ring;
	int rc = io_uring_queue_init(1, &ring, 0);

	if (rc == 0) {
		io_uring_queue_exit(&ring);
	}
	return rc;
}

/* Ask for the cheapest way of completing that the kernel knows; older ones refuse what they do not know. */
static int set_up_ring(struct uring *uring, uint32_t depth)
{
	static const unsigned choices[] = {
	    /* 6.1: completions are finished in our own io_uring_enter(), never by an interrupt to us */
	    IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG |
		IORING_SETUP_SUBMIT_ALL,
	    /* 5.19 */
	    IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SUBMIT_ALL,
	    0,
	};
	int rc = -EINVAL;

	for (unsigned i = 0; rc == -EINVAL && i < sizeof(choices) / sizeof(choices[0]); i++) {
		rc = io_uring_queue_init(depth, &uring->ring, choices[i]);
		uring->deferred_work = choices[i] & IORING_SETUP_DEFER_TASKRUN;
	}
	return rc;
}

/* See uring_hold(). */
static int held_file = -1;

void uring_hold(int fd)
{
	held_file = fd;
}

/*
 * The table of registered files: room for disks, and last what holds the lock on the fence, and the file that
 * is held (-1: none). The kernel lets go of them when it takes the ring apart, which it does when the last
 * operation is over.
 */
static int register_files(struct uring *uring, int fence)
{
	int files[FILES + 2];
	int rc;

	files[FILES] = fence_lock(fence);
	if (files[FILES] < 0) {
		return files[FILES];
	}
	files[FILES + 1] = held_file;
	for (int i = 0; i < FILES; i++) {
		files[i] = -1;
		uring->free_files[i] = (uint16_t)(FILES - 1 - i);
	}
	rc = io_uring_register_files(&uring->ring, files, FILES + 2);
	close(files[FILES]);
	uring->free_count = FILES;
	return rc;
}

static int watch_completions(struct uring *uring)
{
	int rc = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

	if (rc < 0) {
		return -errno;
	}
	uring->watch = (struct fd_watch){.ready = uring_ready, .fd = rc};
	rc = io_uring_register_eventfd(&uring->ring, uring->watch.fd);
	if (!rc) {
		signal_completions(uring, false);
		rc = fd_watch_start(uring->reactor, &uring->watch);
	}
	if (rc) {
		close(uring->watch.fd);
	}
	return rc;
}

static void uring_destroy(struct kernel_io *io)
{
	struct uring *uring = (struct uring *)io;
	int fd;

	poller_stop(&uring->poller);
	reactor_cancel(uring->reactor, &uring->flush);
	fd = fd_watch_stop(uring->reactor, &uring->watch);
	io_uring_queue_exit(&uring->ring);
	buffers_free(&uring->buffers);
	close(fd);
	free(uring);
}

static void uring_add_file(struct kernel_io *io, struct io_file *file)
{
	struct uring *uring = (struct uring *)io;

	if (uring->free_count) {
		int index = uring->free_files[uring->free_count - 1];

		if (io_uring_register_files_update(&uring->ring, index, &file->fd, 1) == 1) {
			uring->free_count--;
			file->index = index;
		}
	}
}

static void uring_remove_file(struct kernel_io *io, struct io_file *file)
{
	struct uring *uring = (struct uring *)io;
	const int none = -1;

	if (file->index >= 0) {
		io_uring_register_files_update(&uring->ring, file->index, (int *)&none, 1);
		uring->free_files[uring->free_count++] = file->index;
		file->index = -1;
	}
}

static int uring_add_buffer(struct kernel_io *io, void *address, size_t size)
{
	struct uring *uring = (struct uring *)io;

	return buffers_add(&uring->buffers, &uring->ring, address, size);
}

static int uring_remove_buffer(struct kernel_io *io, const void *address)
{
	struct uring *uring = (struct uring *)io;

	return buffers_remove(&uring->buffers, &uring->ring, address);
}

static uint64_t uring_buffer_uses(const struct kernel_io *io)
{
	return ((const struct uring *)io)->buffers.used;
}

static const struct kernel_io_ops uring_ops = {
    .destroy = uring_destroy,
    .queue = uring_queue,
    .cancel = uring_cancel,
    .add_file = uring_add_file,
    .remove_file = uring_remove_file,
    .add_buffer = uring_add_buffer,
    .remove_buffer = uring_remove_buffer,
    .buffer_uses = uring_buffer_uses,
};

struct kernel_io *uring_create(struct reactor *reactor, uint32_t depth, int fence)
{
	struct uring *uring = calloc(1, sizeof(*uring));
	int rc;

	if (!uring) {
		return NULL;
	}
	uring->io.ops = &uring_ops;
	uring->reactor = reactor;
	uring->flush.run = uring_flush;
	rc = set_up_ring(uring, depth);
	if (rc) {
		goto no_ring;
	}
	rc = register_files(uring, fence);
	if (rc) {
		goto no_files;
	}
	rc = watch_completions(uring);
	if (rc) {
		goto no_files;
	}
	uring->poller = (struct poller){.run = uring_run, .sleep = uring_sleep, .wake = uring_wake};
	poller_start(reactor, &uring->poller);
	return &uring->io;
no_files:
	io_uring_queue_exit(&uring->ring);
no_ring:
	free(uring);
	errno = -rc;
	return NULL;
}
