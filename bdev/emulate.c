/*
 * A request becomes a job, of which a handle has a few, each with a buffer; others wait in line. A job does one
 * part after another: advance() looks at the end of the last part and submits the next one. Parts that end at
 * once do not nest: run() goes round until one is under way.
 */
#include "bdev/emulate.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "bdev/detour.h"
#include "bdev/iov.h"
#include "bdev/ranges.h"

#define JOBS 4
#define CHUNK BDEV_ATOMIC_BYTES /* bytes a part has at most */
#define THE_LOCK BDEV_ALL_OPS	/* as the operation of a part: the lock was granted */

struct job {
	struct bdev_io part; /* first */
	struct iovec iov;
	struct bdev_emulator *emulator;
	struct bdev_io *io;
	struct job *next;      /* of those with nothing to do */
	struct bdev_lock lock; /* COMPARE_AND_WRITE */
	uint8_t *buffer;
	uint64_t done; /* bytes of the request */
	int status;    /* of the last part */
	bool locked;
	bool under_way; /* a part is */
	bool running;	/* in run() */
	bool over;	/* status is the outcome */
};

struct bdev_emulator {
	struct bdev *bdev;
	struct bdev_io *waiting, **waiting_end;
	struct job *idle;
	bool serving;
	uint8_t *memory;
	struct job job[JOBS];
};

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

static uint8_t zeroes[CHUNK] __attribute__((aligned(4096)));

/* --- parts ----------------------------------------------------------------------------------------------- */

static void run(struct job *job);

static void part_done(struct bdev_io *part, int status)
{
	struct job *job = (struct job *)part;

	job->under_way = false;
	job->status = status;
	run(job);
}

static void submit(struct job *job, enum bdev_op op, uint64_t offset, uint64_t length, void *data)
{
	job->iov = (struct iovec){data, length};
	job->part = (struct bdev_io){
	    .bdev = job->emulator->bdev,
	    .done = part_done,
	    .iov = &job->iov,
	    .iovcnt = 1,
	    .op = (uint8_t)op,
	    .flags = op == BDEV_WRITE ? job->io->flags & BDEV_IO_FUA : 0,
	    .offset = offset,
	    .length = length,
	};
	job->under_way = true;
	detour_submit_part(&job->part);
}

static void finish(struct job *job, int status)
{
	job->status = status;
	job->over = true;
}

static uint64_t next_length(const struct job *job)
{
	uint64_t left = job->io->length - job->done;

	return left < CHUNK ? left : CHUNK;
}

/* --- operations: each is called to begin, and after every part ------------------------------------------- */

static void advance_zeroes(struct job *job, bool began)
{
	if (began) {
		job->done += job->part.length;
	}
	if (job->done == job->io->length) {
		finish(job, 0);
		return;
	}
	submit(job, BDEV_WRITE, job->io->offset + job->done, next_length(job), zeroes);
}

static void advance_compare(struct job *job, bool began)
{
	if (began) {
		uint64_t length = job->part.length;
		uint64_t same = iov_compare(job->io, job->done, job->buffer, length);

		job->done += same;
		if (same < length) {
			job->io->miscompare = job->done;
			finish(job, -EILSEQ);
			return;
		}
	}
	if (job->done == job->io->length) {
		finish(job, 0);
		return;
	}
	submit(job, BDEV_READ, job->io->offset + job->done, next_length(job), job->buffer);
}

/* What is read is of no interest. */
static void advance_verify(struct job *job, bool began)
{
	if (began) {
		job->done += job->part.length;
	}
	if (job->done == job->io->length) {
		finish(job, 0);
		return;
	}
	submit(job, BDEV_READ, job->io->offset + job->done, next_length(job), job->buffer);
}

/* Where the next part of a copy begins: from behind where it would else overwrite what is still to be read. */
static uint64_t copy_position(const struct job *job)
{
	const struct bdev_io *io = job->io;
	bool backwards = io->source < io->offset && io->offset < io->source + io->length;

	return backwards ? io->length - job->done - next_length(job) : job->done;
}

static void advance_copy(struct job *job, bool began)
{
	const struct bdev_io *io = job->io;

	if (began && job->part.op == BDEV_READ) {
		submit(job, BDEV_WRITE, io->offset + copy_position(job), job->part.length, job->buffer);
		return;
	}
	if (began) {
		job->done += job->part.length;
	}
	if (job->done == io->length) {
		finish(job, 0);
		return;
	}
	submit(job, BDEV_READ, io->source + copy_position(job), next_length(job), job->buffer);
}

static void granted(struct bdev_lock *lock, int status)
{
	struct job *job = container_of(lock, struct job, lock);

	job->locked = status == 0;
	job->under_way = false;
	job->status = status;
	run(job);
}

static void wait_for_lock(struct job *job)
{
	job->lock.granted = granted;
	job->lock.offset = job->io->offset;
	job->lock.length = job->io->length;
	job->part.op = THE_LOCK;
	job->under_way = true;
	(void)bdev_lock_range(job->emulator->bdev, &job->lock); /* there is a table: bdev_submit() has looked */
}

/* What is on the disk is in the buffer. If it is as expected, write the rest of the data, by way of an intent.
 */
static void compare_and_write(struct job *job)
{
	struct range_table *table = job->emulator->bdev->ranges->table;
	struct bdev_io *io = job->io;
	uint64_t same = iov_compare(io, 0, job->buffer, io->length);

	if (same < io->length) {
		io->miscompare = same;
		finish(job, -EILSEQ);
		return;
	}
	iov_gather(io, io->length, table->data[job->lock.entry], io->length);
	range_table_intend(table, job->lock.entry, io->token);
	submit(job, BDEV_WRITE, io->offset, io->length, table->data[job->lock.entry]);
}

static void advance_compare_and_write(struct job *job, bool began)
{
	const struct bdev_ranges *ranges = job->emulator->bdev->ranges;
	struct range_table *table = ranges->table;
	const struct bdev_io *io = job->io;

	if (!began) {
		wait_for_lock(job);
	} else if (job->part.op == THE_LOCK) {
		if (io->flags & BDEV_IO_AGAIN &&
		    range_table_was_done(table, io->token, io->offset, io->length)) {
			finish(job, 0);
			return;
		}
		submit(job, BDEV_READ, io->offset, io->length, job->buffer);
	} else if (job->part.op == BDEV_READ) {
		compare_and_write(job);
	} else {
		range_table_written(table, job->lock.entry, ranges->owner);
		finish(job, 0);
	}
}

static void advance(struct job *job, bool began)
{
	if (began && job->status) {
		/* Of parts this is no comparison but a medium that is damaged. */
		finish(job, job->status == -EILSEQ ? -EIO : job->status);
		return;
	}
	switch (job->io->op) {
	case BDEV_WRITE_ZEROES:
		advance_zeroes(job, began);
		break;
	case BDEV_COMPARE:
		advance_compare(job, began);
		break;
	case BDEV_VERIFY:
		advance_verify(job, began);
		break;
	case BDEV_COPY:
		advance_copy(job, began);
		break;
	case BDEV_COMPARE_AND_WRITE:
		advance_compare_and_write(job, began);
		break;
	default:
		finish(job, -EOPNOTSUPP);
		break;
	}
}

/* --- jobs ------------------------------------------------------------------------------------------------ */

static void serve(struct bdev_emulator *emulator);

static void end(struct job *job)
{
	struct bdev_emulator *emulator = job->emulator;
	struct bdev_io *io = job->io;
	int status = job->status;

	if (job->locked) {
		/* An intent that failed: nobody can promise it any more, and its initiator is told. */
		range_table_drop(emulator->bdev->ranges->table, job->lock.entry);
		job->locked = false;
		bdev_unlock_range(emulator->bdev, &job->lock);
	}
	job->io = NULL;
	job->next = emulator->idle;
	emulator->idle = job;
	bdev_complete(io, status);
}

static void run(struct job *job)
{
	if (job->running) {
		return; /* the loop below goes on */
	}
	job->running = true;
	while (!job->over && !job->under_way) {
		advance(job, true);
	}
	job->running = false;
	if (job->over) {
		struct bdev_emulator *emulator = job->emulator;

		end(job);
		serve(emulator);
	}
}

static void begin(struct job *job, struct bdev_io *io)
{
	job->io = io;
	job->done = 0;
	job->over = job->under_way = false;
	job->running = true;
	advance(job, false);
	job->running = false;
	run(job);
}

/* Begin what waits. What ends at once comes back here: one is enough. */
static void serve(struct bdev_emulator *emulator)
{
	if (emulator->serving) {
		return;
	}
	emulator->serving = true;
	while (emulator->waiting && emulator->idle) {
		struct bdev_io *io = emulator->waiting;
		struct job *job = emulator->idle;

		emulator->waiting = io->next;
		if (!io->next) {
			emulator->waiting_end = &emulator->waiting;
		}
		emulator->idle = job->next;
		begin(job, io);
	}
	emulator->serving = false;
}

/* With the first such request: few handles ever see one. */
static struct bdev_emulator *create(struct bdev *bdev)
{
	struct bdev_emulator *emulator = calloc(1, sizeof(*emulator));

	if (!emulator) {
		return NULL;
	}
	emulator->memory = mmap(NULL, JOBS * CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (emulator->memory == MAP_FAILED) {
		free(emulator);
		return NULL;
	}
	emulator->bdev = bdev;
	emulator->waiting_end = &emulator->waiting;
	for (unsigned i = 0; i < JOBS; i++) {
		emulator->job[i].emulator = emulator;
		emulator->job[i].buffer = emulator->memory + i * CHUNK;
		emulator->job[i].next = emulator->idle;
		emulator->idle = &emulator->job[i];
	}
	return emulator;
}

void emulate(struct bdev_io *io)
{
	struct bdev *bdev = io->bdev;

	io->stage = BDEV_STAGE_PARTS;
	if (!bdev->emulator) {
		bdev->emulator = create(bdev);
	}
	if (!bdev->emulator) {
		bdev_complete(io, -ENOMEM);
		return;
	}
	io->next = NULL;
	*bdev->emulator->waiting_end = io;
	bdev->emulator->waiting_end = &io->next;
	serve(bdev->emulator);
}

int emulate_abort(struct bdev_emulator *emulator, struct bdev_io *io)
{
	if (detour_unlink(&emulator->waiting, &emulator->waiting_end, io)) {
		bdev_complete(io, -ECANCELED);
		return 0;
	}
	for (unsigned i = 0; i < JOBS; i++) {
		struct job *job = &emulator->job[i];

		if (job->io == io && job->under_way && job->part.op < BDEV_OPS) {
			return bdev_abort(&job->part);
		}
	}
	return -ENOTSUP;
}

void emulator_free(struct bdev_emulator *emulator)
{
	if (emulator) {
		munmap(emulator->memory, JOBS * CHUNK);
		free(emulator);
	}
}
