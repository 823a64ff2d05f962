/*
 * A request is carried out in pieces, one at a time; most have one piece. A piece takes the shape of
 *
 *   DIRECT  as many iovecs as one call takes, straight from or into the caller's memory
 *   BOUNCE  a part of the range, by way of an aligned buffer of our own: where the caller's memory is not
 *           aligned as O_DIRECT demands, and for all that remains after a short transfer
 *   ZEROES  a part of the range written from a buffer of zeroes, where the file system cannot zero a range
 *   WHOLE   fdatasync() or fallocate(), which have no parts
 *
 * After a piece has ended: try again (EAGAIN, EINTR), go on with the next piece, or complete the request.
 */
#include "bdev/transfer.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/io_uring.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "bdev/iov.h"

#define DEPTH 512       /* requests with the kernel */
#define IOVECS_MAX 1024 /* UIO_MAXIOV: what one system call takes */
#define BOUNCE_BUFFERS 32
#define BOUNCE_SIZE (128U << 10)
#define ZEROES_SIZE (256U << 10)

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

enum shape { DIRECT, BOUNCE, ZEROES, WHOLE };

struct transfer {
	struct uring_op op; /* the piece that is under way */
	struct transfer *next;
	struct transfer_file *file;
	struct bdev_io *io;
	uint64_t done;  /* bytes */
	uint64_t piece; /* bytes */
	uint32_t iovs;  /* behind us, when DIRECT */
	enum shape shape;
	uint8_t *bounce; /* held from the first BOUNCE piece to the end */
};

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
	struct uring *uring;
	uint32_t references;
	uint32_t bounce_count;
	uint8_t *bounce_free[BOUNCE_BUFFERS];
	uint8_t *bounce_memory;
	struct transfer *free;
	struct io_queue waiting;              /* for a transfer */
	struct transfer_queue bounce_waiting; /* for a bounce buffer */
	struct transfer transfers[DEPTH];
};

static struct engine *engines; /* one a reactor, and a process has one reactor */

/* Never written: one page of zeroes to the kernel. */
static uint8_t zeroes[ZEROES_SIZE] __attribute__((aligned(4096)));

/* --- pieces ----------------------------------------------------------------------------------------- */

static bool is_aligned(const struct transfer_file *file, const struct bdev_io *io)
{
	const uintptr_t mask = file->memory_alignment - 1;
	uintptr_t bits = 0;

	for (uint32_t i = 0; i < io->iovcnt; i++) {
		bits |= (uintptr_t)io->iov[i].iov_base | io->iov[i].iov_len;
	}
	if (io->iovcnt > IOVECS_MAX) {
		/* Where it is split is known by then only: any iovec may end a piece. */
		for (uint32_t i = 0; i < io->iovcnt; i++) {
			if (io->iov[i].iov_len & (file->offset_alignment - 1)) {
				return false;
			}
		}
	}
	return !(bits & mask);
}

static uint32_t min_u32(uint64_t a, uint32_t b)
{
	return a < b ? (uint32_t)a : b;
}

static void prepare_direct(struct transfer *transfer)
{
	const struct bdev_io *io = transfer->io;
	const struct iovec *iov = io->iov + transfer->iovs;
	uint32_t count = min_u32(io->iovcnt - transfer->iovs, IOVECS_MAX);
	bool write = io->op == BDEV_WRITE;

	transfer->piece = io->length - transfer->done;
	if (count == 1) {
		transfer->op.code = write ? URING_WRITE : URING_READ;
		transfer->op.address = iov->iov_base;
		transfer->op.length = transfer->piece = iov->iov_len;
		return;
	}
	if (count < io->iovcnt) {
		transfer->piece = 0;
		for (uint32_t i = 0; i < count; i++) {
			transfer->piece += iov[i].iov_len;
		}
	}
	transfer->op.code = write ? URING_WRITEV : URING_READV;
	transfer->op.address = iov;
	transfer->op.length = count;
}

static void prepare_bounce(struct transfer *transfer)
{
	const struct bdev_io *io = transfer->io;

	transfer->piece = min_u32(io->length - transfer->done, BOUNCE_SIZE);
	transfer->op.code = io->op == BDEV_WRITE ? URING_WRITE : URING_READ;
	transfer->op.address = transfer->bounce;
	transfer->op.length = transfer->piece;
	if (io->op == BDEV_WRITE) {
		iov_copy(io, transfer->done, transfer->bounce, transfer->piece);
	}
}

static void prepare_zeroes(struct transfer *transfer)
{
	transfer->piece = min_u32(transfer->io->length - transfer->done, ZEROES_SIZE);
	transfer->op.code = URING_WRITE;
	transfer->op.address = zeroes;
	transfer->op.length = transfer->piece;
	transfer->op.flags = 0;
}

static bool may_punch(const struct transfer_file *file, const struct bdev_io *io)
{
	return (io->flags & BDEV_IO_UNMAP) && file->punch_hole;
}

static void prepare_whole(struct transfer *transfer)
{
	const struct bdev_io *io = transfer->io;
	bool punch = io->op == BDEV_UNMAP || may_punch(transfer->file, io);

	if (io->op == BDEV_FLUSH) {
		transfer->op.code = URING_FSYNC;
		transfer->op.flags = IORING_FSYNC_DATASYNC;
		return;
	}
	transfer->op.code = URING_FALLOCATE;
	transfer->op.flags = FALLOC_FL_KEEP_SIZE | (punch ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
	transfer->op.length = io->length;
}

static void run_piece(struct transfer *transfer)
{
	switch (transfer->shape) {
	case DIRECT:
		prepare_direct(transfer);
		break;
	case BOUNCE:
		prepare_bounce(transfer);
		break;
	case ZEROES:
		prepare_zeroes(transfer);
		break;
	case WHOLE:
		prepare_whole(transfer);
		break;
	}
	transfer->op.offset = transfer->io->offset + transfer->done;
	uring_queue(transfer->file->engine->uring, &transfer->op);
}

/* --- bounce buffers --------------------------------------------------------------------------------- */

/* Go on through a bounce buffer, as soon as there is one. */
static void run_bounced(struct transfer *transfer)
{
	struct engine *engine = transfer->file->engine;

	/* A short transfer may have ended anywhere: its last bytes are transferred again. */
	transfer->done &= ~(uint64_t)(transfer->file->offset_alignment - 1);
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

static void finish(struct transfer *transfer, int status)
{
	struct engine *engine = transfer->file->engine;
	struct bdev_io *io = transfer->io;
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
	bdev_complete(io, status);
}

/* @result bytes were moved. */
static void advance(struct transfer *transfer, uint64_t result)
{
	const struct bdev_io *io = transfer->io;

	if (transfer->shape == BOUNCE && io->op == BDEV_READ) {
		iov_copy(io, transfer->done, transfer->bounce, result);
	}
	transfer->done += result;
	if (transfer->done == io->length) {
		finish(transfer, 0);
	} else if (transfer->shape == DIRECT && result == transfer->piece) {
		transfer->iovs += IOVECS_MAX;
		run_piece(transfer);
	} else if (result == 0) {
		finish(transfer, -EIO); /* the file is shorter than it was */
	} else if (transfer->shape != DIRECT) {
		run_piece(transfer);
	} else {
		run_bounced(transfer);
	}
}

static enum shape shape_of(const struct transfer_file *file, const struct bdev_io *io)
{
	switch (io->op) {
	case BDEV_READ:
	case BDEV_WRITE:
		return is_aligned(file, io) ? DIRECT : BOUNCE;
	case BDEV_WRITE_ZEROES:
		return file->zero_range || may_punch(file, io) ? WHOLE : ZEROES;
	default:
		return WHOLE;
	}
}

static void fail(struct transfer *transfer, int error)
{
	struct transfer_file *file = transfer->file;
	const struct bdev_io *io = transfer->io;

	if (error == -EAGAIN || error == -EINTR) {
		run_piece(transfer);
	} else if (error == -EOPNOTSUPP && io->op == BDEV_WRITE_ZEROES && transfer->shape == WHOLE) {
		*(may_punch(file, io) ? &file->punch_hole : &file->zero_range) = false;
		transfer->shape = shape_of(file, io);
		run_piece(transfer);
	} else {
		finish(transfer, error);
	}
}

static void piece_done(struct uring_op *op, int result)
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
	transfer->iovs = 0;
	transfer->op.file = &file->uring;
	transfer->op.flags = io->op == BDEV_WRITE && (io->flags & BDEV_IO_FUA) ? RWF_DSYNC : 0;
	transfer->shape = shape_of(file, io);
	if (transfer->shape == BOUNCE) {
		run_bounced(transfer);
	} else {
		run_piece(transfer);
	}
}

void transfer_start(struct transfer_file *file, struct bdev_io *io)
{
	struct engine *engine = file->engine;

	if (engine->free) {
		begin(engine, file, io);
		return;
	}
	io->scratch[0] = file;
	io->next = NULL;
	*engine->waiting.end = io;
	engine->waiting.end = &io->next;
}

/* --- life ------------------------------------------------------------------------------------------- */

static struct engine *engine_create(struct reactor *reactor)
{
	struct engine *engine = calloc(1, sizeof(*engine));

	if (!engine) {
		return NULL;
	}
	/* Takes address space; memory only once it is used. */
	engine->bounce_memory = mmap(NULL, BOUNCE_BUFFERS * BOUNCE_SIZE, PROT_READ | PROT_WRITE,
	                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (engine->bounce_memory == MAP_FAILED) {
		free(engine);
		errno = ENOMEM;
		return NULL;
	}
	engine->uring = uring_create(reactor, DEPTH);
	if (!engine->uring) {
		int error = errno;

		munmap(engine->bounce_memory, BOUNCE_BUFFERS * BOUNCE_SIZE);
		free(engine);
		errno = error;
		return NULL;
	}
	engine->reactor = reactor;
	engine->waiting.end = &engine->waiting.first;
	engine->bounce_waiting.end = &engine->bounce_waiting.first;
	while (engine->bounce_count < BOUNCE_BUFFERS) {
		engine->bounce_free[engine->bounce_count] =
		    engine->bounce_memory + engine->bounce_count * BOUNCE_SIZE;
		engine->bounce_count++;
	}
	for (unsigned i = 0; i < DEPTH; i++) {
		engine->transfers[i].op.done = piece_done;
		engine->transfers[i].next = engine->free;
		engine->free = &engine->transfers[i];
	}
	return engine;
}

struct engine *engine_get(struct reactor *reactor)
{
	struct engine *engine = engines;

	while (engine && engine->reactor != reactor) {
		engine = engine->next;
	}
	if (!engine) {
		engine = engine_create(reactor);
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
	uring_destroy(engine->uring);
	munmap(engine->bounce_memory, BOUNCE_BUFFERS * BOUNCE_SIZE);
	free(engine);
}

void engine_add_file(struct engine *engine, struct transfer_file *file, int fd)
{
	file->engine = engine;
	uring_add_file(engine->uring, &file->uring, fd);
}

void engine_remove_file(struct engine *engine, struct transfer_file *file)
{
	uring_remove_file(engine->uring, &file->uring);
}
