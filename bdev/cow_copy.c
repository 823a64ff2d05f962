#include "bdev/cow_copy.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "bdev/iov.h"

#define RETRY_NS 100000 /* while another reactor holds what we need */
#define ALIGNMENT 4096

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

static void list_init(struct cow_list *list)
{
	list->first = NULL;
	list->end = &list->first;
}

static void append(struct cow_list *list, struct bdev_io *io)
{
	io->next = NULL;
	*list->end = io;
	list->end = &io->next;
}

static void append_all(struct cow_list *list, struct cow_list *more)
{
	if (more->first) {
		*list->end = more->first;
		list->end = more->end;
		list_init(more);
	}
}

static void resume_all(struct cow_bdev *cow, struct cow_list *list)
{
	struct bdev_io *io = list->first, *next;

	list_init(list);
	for (; io; io = next) {
		next = io->next;
		cow_resume(&cow->stacked.bdev, io);
	}
}

void cow_defer(struct cow_bdev *cow)
{
	reactor_defer(cow->stacked.bdev.reactor, &cow->work);
}

bool cow_look_again(struct cow_bdev *cow)
{
	struct reactor *reactor = cow->stacked.bdev.reactor;

	return cow->retry.place ||
	       !timer_set(reactor, &cow->retry, reactor_now(reactor) + reactor_ns_to_ticks(RETRY_NS));
}

/* --- the end of a copy ------------------------------------------------------------------------------ */

void cow_copy_end(struct cow_copy *copy, int status)
{
	struct cow_bdev *cow = copy->cow;
	struct bdev_io *request = copy->request;

	append_all(&cow->resumable, &copy->waiting);
	append_all(&cow->resumable, &cow->starving);
	copy->count = 0;
	copy->next = cow->free;
	cow->free = copy;
	cow->free_count++;
	cow_defer(cow);
	if (request) {
		cow_ended(&cow->stacked.bdev, request, status);
	} else {
		cow->fill.pending--;
		if (status && !cow->fill.status) {
			cow->fill.status = status;
		}
	}
}

void cow_copy_fail(struct cow_copy *copy, int status)
{
	for (uint64_t i = 0; i < copy->count; i++) {
		owned_release(cow_map_claim(copy->cow->map, copy->first + i));
	}
	cow_copy_end(copy, status);
}

/* --- from claim to data on the overlay -------------------------------------------------------------- */

static void data_written(struct bdev_io *io, int status)
{
	struct cow_copy *copy = container_of(io, struct cow_copy, io);
	struct cow_bdev *cow = copy->cow;

	if (status) {
		cow_copy_fail(copy, status);
		return;
	}
	copy->next = cow->written;
	cow->written = copy;
	cow_defer(cow);
}

/* Whether zeroes may be a hole: the guest may have asked for zeroes that there is room for. */
static uint8_t zero_flags(const struct bdev_io *io)
{
	return io->op == BDEV_UNMAP ? BDEV_IO_UNMAP : io->flags & BDEV_IO_UNMAP;
}

static void write_data(struct cow_copy *copy, uint8_t op)
{
	struct cow_bdev *cow = copy->cow;

	copy->iov = (struct iovec){copy->buffer, copy->length};
	copy->io = (struct bdev_io){
	    .bdev = cow->overlay,
	    .done = data_written,
	    .op = op,
	    .flags = op == BDEV_WRITE ? 0 : zero_flags(copy->request),
	    .iov = &copy->iov,
	    .iovcnt = op == BDEV_WRITE ? 1 : 0,
	    .offset = cow->map->layout.data_offset + copy->offset,
	    .length = copy->length,
	};
	bdev_submit(&copy->io);
}

/* What a request has of the copy's clusters: bytes of the disk, from @start to @end. */
static bool share(const struct cow_copy *copy, const struct bdev_io *io, uint64_t *start, uint64_t *end)
{
	*start = io->offset > copy->offset ? io->offset : copy->offset;
	*end = io->offset + io->length < copy->offset + copy->length ? io->offset + io->length
								     : copy->offset + copy->length;
	return *start == copy->offset && *end == copy->offset + copy->length;
}

/* Put the request's own data over those of the base, so that they are written with them. */
static void merge(struct cow_copy *copy)
{
	const struct bdev_io *io = copy->request;
	uint64_t start, end;

	if (!io || io->op == BDEV_READ) {
		return;
	}
	share(copy, io, &start, &end);
	if (io->op == BDEV_WRITE) {
		iov_copy(io, start - io->offset, copy->buffer + (start - copy->offset), end - start);
	} else {
		memset(copy->buffer + (start - copy->offset), 0, end - start);
	}
}

static void base_read(struct bdev_io *io, int status)
{
	struct cow_copy *copy = container_of(io, struct cow_copy, io);

	if (status) {
		cow_copy_fail(copy, status);
		return;
	}
	merge(copy);
	write_data(copy, BDEV_WRITE);
}

static void read_base(struct cow_copy *copy)
{
	struct cow_bdev *cow = copy->cow;
	uint64_t length = 0;

	if (copy->offset < cow->base_size) {
		length = cow->base_size - copy->offset;
		length = length < copy->length ? length : copy->length;
	}
	memset(copy->buffer + length, 0, copy->length - length);
	copy->iov = (struct iovec){copy->buffer, length};
	copy->io = (struct bdev_io){
	    .bdev = cow->base,
	    .done = base_read,
	    .op = BDEV_READ,
	    .iov = &copy->iov,
	    .iovcnt = length ? 1 : 0,
	    .offset = length ? copy->offset : 0,
	    .length = length,
	};
	bdev_submit(&copy->io);
}

static bool becomes_zeroes(const struct bdev_io *io)
{
	return io && (io->op == BDEV_WRITE_ZEROES || io->op == BDEV_UNMAP);
}

static void set_range(struct cow_copy *copy)
{
	const struct cow_bdev *cow = copy->cow;
	uint64_t left;

	copy->offset = copy->first << cow->cluster_shift;
	copy->length = copy->count << cow->cluster_shift;
	left = cow->stacked.bdev.size - copy->offset;
	if (copy->length > left) {
		copy->length = left; /* the last cluster of the disk is as long as the disk has it */
	}
}

/* Claim clusters that follow the first one, as long as all of them become zeroes, and are in one block of the
 * map. */
static void extend(struct cow_copy *copy, uint64_t count)
{
	struct cow_bdev *cow = copy->cow;
	uint64_t start, end;

	while (copy->count < count) {
		uint64_t cluster = copy->first + copy->count;

		if (cow_map_block_of(cow->map, cluster) != cow_map_block_of(cow->map, copy->first) ||
		    cow_map_has(cow->map, cluster) ||
		    !owned_take(cow_map_claim(cow->map, cluster), cow->owner)) {
			return;
		}
		copy->count++;
		set_range(copy);
		if (cow_map_has(cow->map, cluster) || !share(copy, copy->request, &start, &end)) {
			owned_release(cow_map_claim(cow->map, cluster));
			copy->count--;
			set_range(copy);
			return;
		}
	}
}

struct cow_copy *cow_copy_take(struct cow_bdev *cow, uint64_t cluster, struct bdev_io *io)
{
	struct cow_copy *copy = cow->free;

	cow->free = copy->next;
	cow->free_count--;
	copy->request = io;
	copy->first = cluster;
	copy->count = 1;
	set_range(copy);
	return copy;
}

void cow_copy_run(struct cow_copy *copy)
{
	const struct bdev_io *io = copy->request;
	uint64_t start, end;
	bool whole = io && io->op != BDEV_READ && share(copy, io, &start, &end);

	if (whole && becomes_zeroes(io)) {
		write_data(copy, BDEV_WRITE_ZEROES);
	} else if (whole) {
		merge(copy);
		write_data(copy, BDEV_WRITE);
	} else {
		read_base(copy);
	}
}

/* The copy of ours that brings @cluster. */
static struct cow_copy *find_copy(struct cow_bdev *cow, uint64_t cluster)
{
	for (struct cow_copy *copy = cow->copies; copy < cow->copies + COW_COPIES; copy++) {
		if (copy->count && cluster - copy->first < copy->count) {
			return copy;
		}
	}
	return NULL;
}

enum cow_start cow_copy_start(struct cow_bdev *cow, struct bdev_io *io, uint64_t cluster, uint64_t *count)
{
	struct cow_copy *copy = find_copy(cow, cluster);
	uint64_t start, end;

	if (copy) {
		append(&copy->waiting, io);
		return COW_WAITS;
	}
	if (!cow->free) {
		append(&cow->starving, io);
		return COW_WAITS;
	}
	if (!owned_take(cow_map_claim(cow->map, cluster), cow->owner)) {
		if (!cow_look_again(cow)) {
			return COW_FAILED;
		}
		append(&cow->contended, io);
		return COW_WAITS;
	}
	if (cow_map_has(cow->map, cluster)) { /* it got there before we claimed it */
		owned_release(cow_map_claim(cow->map, cluster));
		return COW_THERE;
	}
	copy = cow_copy_take(cow, cluster, io);
	if (becomes_zeroes(io) && share(copy, io, &start, &end)) {
		extend(copy, *count);
	}
	*count = copy->count;
	cow_progress_of(io)->pending++;
	cow_copy_run(copy);
	return COW_STARTED;
}

/* --- once a turn ------------------------------------------------------------------------------------ */

static void work(struct deferred *deferred)
{
	struct cow_bdev *cow = container_of(deferred, struct cow_bdev, work);

	cow_commit(cow);
	resume_all(cow, &cow->resumable);
	cow_fill(cow);
}

static void retry(struct timer *timer)
{
	struct cow_bdev *cow = container_of(timer, struct cow_bdev, retry);

	append_all(&cow->resumable, &cow->contended);
	cow_defer(cow);
}

/* --- life ------------------------------------------------------------------------------------------- */

int cow_copies_init(struct cow_bdev *cow)
{
	uint64_t cluster_size = cow->map->layout.cluster_size;

	/* Takes address space; memory only once it is used. */
	cow->buffers = mmap(NULL, COW_COPIES * cluster_size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (cow->buffers == MAP_FAILED) {
		return -errno;
	}
	cow->image = aligned_alloc(ALIGNMENT, ALIGNMENT);
	if (!cow->image) {
		munmap(cow->buffers, COW_COPIES * cluster_size);
		return -ENOMEM;
	}
	for (unsigned i = 0; i < COW_COPIES; i++) {
		struct cow_copy *copy = &cow->copies[i];

		copy->cow = cow;
		copy->buffer = cow->buffers + i * cluster_size;
		list_init(&copy->waiting);
		copy->next = cow->free;
		cow->free = copy;
	}
	cow->free_count = COW_COPIES;
	list_init(&cow->starving);
	list_init(&cow->contended);
	list_init(&cow->resumable);
	cow->retry.fire = retry;
	cow->work.run = work;
	return 0;
}

void cow_copies_free(struct cow_bdev *cow)
{
	struct reactor *reactor = cow->stacked.bdev.reactor;

	timer_clear(reactor, &cow->retry);
	reactor_cancel(reactor, &cow->work);
	free(cow->image);
	munmap(cow->buffers, COW_COPIES * (uint64_t)cow->map->layout.cluster_size);
}
