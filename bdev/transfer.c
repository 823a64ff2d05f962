/*
 * A request takes a transfer from the pool, is carried out piece by piece, and gives the transfer back. After a
 * piece has ended: try again (EAGAIN, EINTR), go on with the next one, or complete the request.
 */
#include "bdev/transfer.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "bdev/detour.h"
#include "bdev/emulate.h"
#include "bdev/fence.h"
#include "bdev/iov.h"
#include "bdev/piece.h"

#define DEPTH 512 /* requests with the kernel */
#define BOUNCE_BUFFERS 32

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

struct io_queue {
	struct bdev_io *first;
	struct bdev_io **end;
};

struct transfer_queue {
	struct transfer *first;
	struct transfer **end;
};

struct engine {
	struct engine *next;
	struct reactor *reactor;
	enum kernel_io_kind kind;
	struct kernel_io *io;
	uint32_t references;
	uint32_t bounce_count;
	uint8_t *bounce_free[BOUNCE_BUFFERS];
	uint8_t *bounce_memory;
	struct transfer *free;
	struct io_queue waiting;	      /* for a transfer */
	struct transfer_queue bounce_waiting; /* for a bounce buffer */
	struct transfer transfers[DEPTH];
};

static struct engine *engines; /* one a reactor and kind, and a process has one reactor */

static void run_piece(struct transfer *transfer)
{
	piece_prepare(transfer);
	transfer->file->engine->io->ops->queue(transfer->file->engine->io, &transfer->op);
}

/* --- bounce buffers --------------------------------------------------------------------------------- */

/* Go on through a bounce buffer, as soon as there is one. */
static void run_bounced(struct transfer *transfer)
{
	struct engine *engine = transfer->file->engine;

	transfer->shape = BOUNCE;
	if (engine->bounce_count) {
		transfer->bounce = engine->bounce_free[--engine->bounce_count];
		run_piece(transfer);
	} else {
		transfer->next = NULL;
		*engine->bounce_waiting.end = transfer;
		engine->bounce_waiting.end = &transfer->next;
	}
}

static void release_bounce(struct engine *engine, struct transfer *transfer)
{
	struct transfer *next = engine->bounce_waiting.first;

	if (next) {
		engine->bounce_waiting.first = next->next;
		if (!next->next) {
			engine->bounce_waiting.end = &engine->bounce_waiting.first;
		}
		next->bounce = transfer->bounce;
		run_piece(next);
	} else {
		engine->bounce_free[engine->bounce_count++] = transfer->bounce;
	}
	transfer->bounce = NULL;
}

/* --- from request to completion --------------------------------------------------------------------- */

static void begin(struct engine *engine, struct transfer_file *file, struct bdev_io *io);

/* Give a transfer back; the next in line takes it. */
static void release(struct transfer *transfer)
{
	struct engine *engine = transfer->file->engine;
	struct bdev_io *waiting;

	if (transfer->bounce) {
		release_bounce(engine, transfer);
	}
	transfer->next = engine->free;
	engine->free = transfer;
	waiting = engine->waiting.first;
	if (waiting) {
		engine->waiting.first = waiting->next;
		if (!waiting->next) {
			engine->waiting.end = &engine->waiting.first;
		}
		begin(engine, waiting->scratch[0], waiting);
	}
}

static void finish(struct transfer *transfer, int status)
{
	struct bdev_io *io = transfer->io;

	release(transfer);
	bdev_complete(io, status);
}

/* @result bytes were moved. */
static void advance(struct transfer *transfer, uint64_t result)
{
	const struct bdev_io *io = transfer->io;
	uint64_t done = transfer->done + result;
	/* A short transfer may have ended anywhere: what is beyond the last whole unit is moved again. */
	uint64_t whole = done & ~(uint64_t)(transfer->file->offset_alignment - 1);
	bool progress = whole > transfer->done;

	if (transfer->shape == BOUNCE && io->op == BDEV_READ) {
		iov_copy(io, transfer->done, transfer->bounce, result);
	}
	transfer->done = whole;
	if (done == io->length) {
		finish(transfer, 0);
	} else if (!progress) {
		finish(transfer, -EIO); /* the file is shorter than it was */
	} else if (transfer->shape == DIRECT) {
		run_bounced(transfer);
	} else {
		run_piece(transfer);
	}
}

/* The file system cannot zero a range as we have asked it to: the other way, or write zeroes. */
static void zero_otherwise(struct transfer *transfer)
{
	struct transfer_file *file = transfer->file;
	struct bdev_io *io = transfer->io;

	*(piece_may_punch(file, io) ? &file->punch_hole : &file->zero_range) = false;
	if (piece_can_zero(file, io)) {
		run_piece(transfer);
	} else {
		release(transfer);
		emulate(io);
	}
}

static void fail(struct transfer *transfer, int error)
{
	const struct bdev_io *io = transfer->io;

	if ((error == -EAGAIN || error == -EINTR) && !transfer->aborted) {
		run_piece(transfer);
	} else if (error == -EOPNOTSUPP && io->op == BDEV_WRITE_ZEROES) {
		zero_otherwise(transfer);
	} else {
		finish(transfer, transfer->aborted && error == -EINTR ? -ECANCELED : error);
	}
}

static void piece_done(struct file_op *op, int result)
{
	struct transfer *transfer = container_of(op, struct transfer, op);

	if (result < 0) {
		fail(transfer, result);
	} else if (transfer->shape == WHOLE) {
		finish(transfer, 0);
	} else {
		advance(transfer, (uint32_t)result);
	}
}

static void begin(struct engine *engine, struct transfer_file *file, struct bdev_io *io)
{
	struct transfer *transfer = engine->free;

	engine->free = transfer->next;
	transfer->file = file;
	transfer->io = io;
	transfer->done = 0;
	transfer->aborted = false;
	transfer->op.file = &file->io;
	transfer->shape = piece_shape(file, io);
	if (transfer->shape == BOUNCE) {
		run_bounced(transfer);
	} else {
		run_piece(transfer);
	}
}

void transfer_start(struct transfer_file *file, struct bdev_io *io)
{
	struct engine *engine = file->engine;

	if (io->op == BDEV_WRITE_ZEROES && !piece_can_zero(file, io)) {
		emulate(io);
		return;
	}
	if (engine->free) {
		begin(engine, file, io);
		return;
	}
	io->scratch[0] = file;
	io->next = NULL;
	*engine->waiting.end = io;
	engine->waiting.end = &io->next;
}

int transfer_abort(struct transfer_file *file, struct bdev_io *io)
{
	struct engine *engine = file->engine;

	if (detour_unlink(&engine->waiting.first, &engine->waiting.end, io)) {
		bdev_complete(io, -ECANCELED);
		return 0;
	}
	for (unsigned i = 0; i < DEPTH; i++) {
		struct transfer *transfer = &engine->transfers[i];

		/* One that is free may still name it: nothing of that is with the kernel. */
		if (transfer->io == io && engine->io->ops->cancel(engine->io, &transfer->op) == 0) {
			transfer->aborted = true;
			return 0;
		}
	}
	return -ENOTSUP;
}

/* --- life ------------------------------------------------------------------------------------------- */

static struct kernel_io *make_io(struct reactor *reactor, enum kernel_io_kind kind)
{
	static struct kernel_io *(*const create[])(struct reactor *, uint32_t, int) = {
	    [KERNEL_IO_URING] = uring_create,
	    [KERNEL_IO_AIO] = aio_create,
	    [KERNEL_IO_THREADS] = io_threads_create,
	};
	int fence = fence_get(reactor);
	struct kernel_io *io;

	if (fence < 0) {
		errno = -fence;
		return NULL;
	}
	io = create[kind](reactor, DEPTH, fence);
	if (!io) {
		int error = errno;

		fence_put(reactor);
		errno = error;
	}
	return io;
}

static struct engine *engine_create(struct reactor *reactor, enum kernel_io_kind kind)
{
	struct engine *engine = calloc(1, sizeof(*engine));

	if (!engine) {
		return NULL;
	}
	/* Takes address space; memory only once it is used. */
	engine->bounce_memory = mmap(NULL, BOUNCE_BUFFERS * PIECE_BOUNCE, PROT_READ | PROT_WRITE,
				     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (engine->bounce_memory == MAP_FAILED) {
		free(engine);
		errno = ENOMEM;
		return NULL;
	}
	engine->io = make_io(reactor, kind);
	if (!engine->io) {
		int error = errno;

		munmap(engine->bounce_memory, BOUNCE_BUFFERS * PIECE_BOUNCE);
		free(engine);
		errno = error;
		return NULL;
	}
	engine->kind = kind;
	engine->reactor = reactor;
	engine->waiting.end = &engine->waiting.first;
	engine->bounce_waiting.end = &engine->bounce_waiting.first;
	while (engine->bounce_count < BOUNCE_BUFFERS) {
		engine->bounce_free[engine->bounce_count] =
		    engine->bounce_memory + engine->bounce_count * PIECE_BOUNCE;
		engine->bounce_count++;
	}
	for (unsigned i = 0; i < DEPTH; i++) {
		engine->transfers[i].op.done = piece_done;
		engine->transfers[i].next = engine->free;
		engine->free = &engine->transfers[i];
	}
	return engine;
}

static struct engine *find_engine(const struct reactor *reactor, enum kernel_io_kind kind)
{
	struct engine *engine = engines;

	while (engine && (engine->reactor != reactor || engine->kind != kind)) {
		engine = engine->next;
	}
	return engine;
}

struct engine *engine_get(struct reactor *reactor, enum kernel_io_kind kind)
{
	struct engine *engine = find_engine(reactor, kind);

	if (!engine) {
		engine = engine_create(reactor, kind);
		if (!engine) {
			return NULL;
		}
		engine->next = engines;
		engines = engine;
	}
	engine->references++;
	return engine;
}

void engine_put(struct engine *engine)
{
	struct engine **link = &engines;

	if (--engine->references) {
		return;
	}
	while (*link != engine) {
		link = &(*link)->next;
	}
	*link = engine->next;
	engine->io->ops->destroy(engine->io);
	fence_put(engine->reactor);
	munmap(engine->bounce_memory, BOUNCE_BUFFERS * PIECE_BOUNCE);
	free(engine);
}

void engine_add_file(struct engine *engine, struct transfer_file *file, int fd)
{
	file->engine = engine;
	file->io = (struct io_file){.fd = fd, .index = -1};
	if (engine->io->ops->add_file) {
		engine->io->ops->add_file(engine->io, &file->io);
	}
}

void engine_remove_file(struct engine *engine, struct transfer_file *file)
{
	if (engine->io->ops->remove_file) {
		engine->io->ops->remove_file(engine->io, &file->io);
	}
}

/* Buffers are registered with an io_uring. Each keeps the engine, whose ring it is registered with. */
int engine_add_buffer(struct reactor *reactor, void *address, uint64_t size)
{
	struct engine *engine = engine_get(reactor, KERNEL_IO_URING);
	int rc;

	if (!engine) {
		return -errno;
	}
	rc = engine->io->ops->add_buffer(engine->io, address, size);
	if (rc < 0) {
		engine_put(engine);
	}
	return rc;
}

int engine_remove_buffer(struct reactor *reactor, const void *address)
{
	struct engine *engine = find_engine(reactor, KERNEL_IO_URING);
	int rc = engine ? engine->io->ops->remove_buffer(engine->io, address) : -ENOENT;

	if (rc == 0) {
		engine_put(engine);
	}
	return rc;
}

uint64_t engine_buffer_uses(const struct reactor *reactor)
{
	const struct engine *engine = find_engine(reactor, KERNEL_IO_URING);

	return engine ? engine->io->ops->buffer_uses(engine->io) : 0;
}
