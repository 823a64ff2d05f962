#include "bdev/mirror.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bdev/mirror_disk.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

void mirror_list_init(struct mirror_list *list)
{
	list->first = NULL;
	list->end = &list->first;
}

void mirror_append(struct mirror_list *list, struct bdev_io *io)
{
	io->next = NULL;
	*list->end = io;
	list->end = &io->next;
}

void mirror_tell(struct mirror_bdev *mirror)
{
	if (!__atomic_exchange_n(&mirror->shared->news, 1, __ATOMIC_SEQ_CST)) {
		eventfd_write(mirror->event_fd, 1);
	}
}

bool mirror_drop(struct mirror_bdev *mirror, uint32_t place)
{
	bool dropped = !mirror_leg_set(mirror->shared, place, MIRROR_MISSING);

	mirror_tell(mirror);
	return dropped;
}

/* --- regions ---------------------------------------------------------------------------------------- */

void mirror_window(const struct mirror_bdev *mirror, const struct bdev_io *io, uint64_t *first, uint64_t *end)
{
	uint64_t last = (io->offset + io->length - 1) >> mirror->region_shift;

	*first =
	    (io->offset >> mirror->region_shift) + (uint64_t)mirror_progress_of(io)->window * MIRROR_WINDOW;
	*end = *first + MIRROR_WINDOW <= last ? *first + MIRROR_WINDOW : last + 1;
}

/* The bytes of the disk that are written in the window. */
static void window_range(const struct mirror_bdev *mirror, const struct bdev_io *io, uint64_t *from,
			 uint64_t *to)
{
	uint64_t first, end;

	mirror_window(mirror, io, &first, &end);
	*from = first << mirror->region_shift;
	*to = end << mirror->region_shift;
	if (*from < io->offset) {
		*from = io->offset;
	}
	if (*to > io->offset + io->length) {
		*to = io->offset + io->length;
	}
}

static void leave(struct mirror_bdev *mirror, const struct bdev_io *io)
{
	uint64_t first, end;

	mirror_window(mirror, io, &first, &end);
	for (uint64_t i = first; i < end; i++) {
		__atomic_fetch_sub(&mirror->counts[i], 1, __ATOMIC_SEQ_CST);
	}
}

/* Count a write in its regions; returns the flags that any of them has. *@dirty: all are DIRTY. */
static uint8_t count(struct mirror_bdev *mirror, const struct bdev_io *io, bool *dirty)
{
	uint64_t first, end;
	uint8_t any = 0;

	mirror_window(mirror, io, &first, &end);
	*dirty = true;
	for (uint64_t i = first; i < end; i++) {
		uint8_t flags;

		__atomic_fetch_add(&mirror->counts[i], 1, __ATOMIC_SEQ_CST);
		flags = mirror_flags(mirror->shared, i);
		any |= flags;
		if (unlikely((flags & (MIRROR_USED | MIRROR_DIRTY)) != (MIRROR_USED | MIRROR_DIRTY))) {
			*dirty &= (flags & MIRROR_DIRTY) != 0;
			mirror_set(mirror->shared, i, MIRROR_USED | (flags & MIRROR_DIRTY ? 0 : MIRROR_WANTED));
		}
	}
	return any;
}

/* --- writing ---------------------------------------------------------------------------------------- */

static void leg_ended(struct mirror_bdev *mirror, struct bdev_io *io, int status);

/* Send what is to be written to the legs that have not got it yet; come back when the pool is dry. */
static void send(struct mirror_bdev *mirror, struct bdev_io *io)
{
	struct mirror_progress *progress = mirror_progress_of(io);
	uint64_t from = 0, to = 0;

	if (io->op != BDEV_FLUSH) {
		window_range(mirror, io, &from, &to);
	}
	while (progress->todo) {
		uint32_t place = (uint32_t)__builtin_ctz(progress->todo);
		struct child_io *child;

		if (unlikely(!mirror->legs[place])) { /* it is on its way out, or in */
			progress->todo &= (uint16_t)(progress->todo - 1);
			progress->failed |= (uint16_t)MIRROR_BIT(place);
			continue;
		}
		child = children_take(&mirror->stacked.children, io);
		if (!child) {
			return;
		}
		progress->todo &= (uint16_t)(progress->todo - 1);
		progress->sent |= (uint16_t)MIRROR_BIT(place);
		progress->pending++;
		if (io->op == BDEV_UNMAP) { /* all legs have to read the same after */
			child->io.op = BDEV_WRITE_ZEROES;
			child->io.flags |= BDEV_IO_UNMAP;
		}
		child->tag = place;
		child->io.bdev = mirror->legs[place];
		child->io.iov = io->iov;
		child->io.iovcnt = io->iovcnt;
		child->io.offset = io->op == BDEV_FLUSH ? 0 : from + mirror->shared->super.data_offset;
		child->io.length = to - from;
		bdev_submit(&child->io);
	}
	leg_ended(mirror, io, 0);
}

void mirror_send(struct mirror_bdev *mirror, struct bdev_io *io)
{
	struct mirror_progress *progress = mirror_progress_of(io);

	progress->phase = MIRROR_SEND;
	progress->todo = (uint16_t)mirror_written(mirror->shared);
	progress->sent = progress->failed = 0;
	progress->pending = 1;
	send(mirror, io);
}

/* Enter the regions of the window, and write when their bits are set. */
static void enter(struct mirror_bdev *mirror, struct bdev_io *io)
{
	bool dirty;

	mirror_progress_of(io)->phase = MIRROR_ENTER;
	if (unlikely(count(mirror, io, &dirty) & MIRROR_LOCKED)) {
		leave(mirror, io);
		if (!mirror_look_again(mirror)) {
			bdev_complete(io, -ENOMEM);
			return;
		}
		mirror_append(&mirror->contended, io);
		return;
	}
	if (unlikely(!dirty)) {
		mirror_append(&mirror->logging, io);
		mirror_defer(mirror);
		return;
	}
	mirror_send(mirror, io);
}

static void answer(struct mirror_bdev *mirror, struct bdev_io *io)
{
	const struct mirror_shared *shared = mirror->shared;
	struct mirror_progress *progress = mirror_progress_of(io);

	/* A leg may have been dropped, by whomever: it must be on record before anybody relies on this write.
	 */
	if (unlikely(__atomic_load_n(&shared->written, __ATOMIC_SEQ_CST) !=
		     __atomic_load_n(&shared->changed, __ATOMIC_SEQ_CST)) &&
	    !progress->status) {
		progress->phase = MIRROR_ANSWER;
		mirror_append(&mirror->answering, io);
		mirror_defer(mirror);
		return;
	}
	bdev_complete(io, progress->status);
}

/* Legs that failed are dropped, as long as an active one has it all. */
static void judge(struct mirror_bdev *mirror, struct bdev_io *io)
{
	struct mirror_progress *progress = mirror_progress_of(io);
	uint64_t good = progress->sent & ~progress->failed, first, end;
	int error = progress->status ? progress->status : -ENODEV;

	if (good & mirror_active(mirror->shared)) {
		progress->status = 0;
		for (uint32_t place = 0; place < MIRROR_LEGS; place++) {
			if (progress->failed & MIRROR_BIT(place) && !mirror_drop(mirror, place)) {
				/* Every other one went meanwhile: this one, without the data, is what is left.
				 */
				progress->status = error;
			}
		}
		if (!progress->status) {
			return;
		}
	}
	progress->status = error;
	if (io->op != BDEV_FLUSH) {
		mirror_window(mirror, io, &first, &end);
		for (uint64_t i = first; i < end; i++) {
			mirror_set(mirror->shared, i, MIRROR_SUSPECT);
		}
		mirror_tell(mirror);
	}
}

static void leg_ended(struct mirror_bdev *mirror, struct bdev_io *io, int status)
{
	struct mirror_progress *progress = mirror_progress_of(io);
	uint64_t first, end;

	if (--progress->pending) {
		return;
	}
	(void)status;
	if (unlikely(progress->failed || !(progress->sent & mirror_active(mirror->shared)))) {
		judge(mirror, io);
	}
	if (io->op == BDEV_FLUSH) {
		answer(mirror, io);
		return;
	}
	mirror_window(mirror, io, &first, &end);
	leave(mirror, io);
	if (progress->status || end << mirror->region_shift >= io->offset + io->length) {
		answer(mirror, io);
		return;
	}
	progress->window++;
	enter(mirror, io);
}

void mirror_fail(struct mirror_bdev *mirror, struct bdev_io *io, int status)
{
	if (mirror_progress_of(io)->phase == MIRROR_ENTER) {
		leave(mirror, io);
	}
	bdev_complete(io, status);
}

/* --- reading ---------------------------------------------------------------------------------------- */

static bool suspect(const struct mirror_bdev *mirror, const struct bdev_io *io)
{
	uint64_t last = (io->offset + io->length - 1) >> mirror->region_shift;

	for (uint64_t i = io->offset >> mirror->region_shift; i <= last; i++) {
		if (mirror_flags(mirror->shared, i) & MIRROR_SUSPECT) {
			return true;
		}
	}
	return false;
}

/* The leg to read from: the first where they may differ, else the one with the least to do, by turns. */
static uint32_t choose(struct mirror_bdev *mirror, const struct bdev_io *io)
{
	uint64_t active = mirror_active(mirror->shared);
	uint32_t best = (uint32_t)__builtin_ctzll(active);

	if (!(active & (active - 1)) || unlikely(suspect(mirror, io))) {
		return best;
	}
	mirror->turn = (mirror->turn + 1) % mirror->shared->super.legs;
	best = MIRROR_LEGS;
	for (uint32_t i = 0; i < mirror->shared->super.legs; i++) {
		uint32_t place = (mirror->turn + i) % mirror->shared->super.legs;

		if (active & MIRROR_BIT(place) && mirror->legs[place] &&
		    (best == MIRROR_LEGS || mirror->legs[place]->in_flight < mirror->legs[best]->in_flight)) {
			best = place;
		}
	}
	return best < MIRROR_LEGS ? best : (uint32_t)__builtin_ctzll(active);
}

static void read_leg(struct mirror_bdev *mirror, struct bdev_io *io)
{
	uint32_t place = choose(mirror, io);
	struct child_io *child;

	while (unlikely(!mirror->legs[place])) {
		if (!mirror_drop(mirror, place)) {
			bdev_complete(io, -ENODEV);
			return;
		}
		place = choose(mirror, io);
	}
	child = children_take(&mirror->stacked.children, io);
	if (unlikely(!child)) {
		return;
	}
	child->tag = place;
	child->io.bdev = mirror->legs[place];
	child->io.iov = io->iov;
	child->io.iovcnt = io->iovcnt;
	child->io.offset = io->offset + mirror->shared->super.data_offset;
	child->io.length = io->length;
	bdev_submit(&child->io);
}

/* --- requests --------------------------------------------------------------------------------------- */

void mirror_go_on(struct bdev *bdev, struct bdev_io *io)
{
	struct mirror_bdev *mirror = (struct mirror_bdev *)bdev;

	if (io->op == BDEV_READ) {
		read_leg(mirror, io);
		return;
	}
	switch (mirror_progress_of(io)->phase) {
	case MIRROR_ENTER:
		enter(mirror, io);
		break;
	case MIRROR_SEND:
		send(mirror, io);
		break;
	default:
		answer(mirror, io);
		break;
	}
}

static void mirror_ended(struct bdev *bdev, struct bdev_io *io, int status)
{
	struct mirror_bdev *mirror = (struct mirror_bdev *)bdev;
	uint32_t place = mirror->stacked.children.last->tag;

	if (io->op != BDEV_READ) {
		struct mirror_progress *progress = mirror_progress_of(io);

		if (unlikely(status)) {
			progress->failed |= (uint16_t)MIRROR_BIT(place);
			progress->status = progress->status ? progress->status : status;
		}
		leg_ended(mirror, io, status);
		return;
	}
	if (unlikely(status) && mirror_drop(mirror, place)) {
		read_leg(mirror, io); /* from another one */
		return;
	}
	bdev_complete(io, status);
}

static void mirror_submit(struct bdev *bdev, struct bdev_io *io)
{
	struct mirror_bdev *mirror = (struct mirror_bdev *)bdev;
	uint64_t regions;

	switch (io->op) {
	case BDEV_READ:
		read_leg(mirror, io);
		return;
	case BDEV_RESET:
		bdev_complete_when_quiet(io);
		return;
	case BDEV_FLUSH:
		*mirror_progress_of(io) = (struct mirror_progress){0};
		mirror_send(mirror, io);
		return;
	default:
		regions = (io->length >> mirror->region_shift) + 2;
		if (unlikely(io->op == BDEV_WRITE && regions > MIRROR_WINDOW)) {
			bdev_complete(io, -EINVAL); /* gigabytes in one request */
			return;
		}
		*mirror_progress_of(io) = (struct mirror_progress){0};
		enter(mirror, io);
	}
}

static void mirror_close(struct bdev *bdev)
{
	struct mirror_bdev *mirror = (struct mirror_bdev *)bdev;

	mirror_sync_free(mirror);
	mirror_log_free(mirror);
	close(mirror->event_fd);
	munmap(mirror->shared, mirror->shared_size);
	stacked_close(bdev);
}

static const struct bdev_ops mirror_ops = {
    .submit = mirror_submit,
    .close = mirror_close,
};

void mirror_attach(struct bdev *bdev, uint32_t place, struct bdev *base)
{
	((struct mirror_bdev *)bdev)->legs[place] = base;
}

void mirror_detach(struct bdev *bdev, uint32_t place)
{
	((struct mirror_bdev *)bdev)->legs[place] = NULL;
}

static int map_shared(struct mirror_bdev *mirror, int fd)
{
	struct mirror_shared *shared = mmap(NULL, sizeof(*shared), PROT_READ, MAP_SHARED, fd, 0);

	if (shared == MAP_FAILED) {
		return -errno;
	}
	mirror->shared_size = mirror_shared_size(&shared->super, shared->owners);
	munmap(shared, sizeof(*shared));
	shared = mmap(NULL, mirror->shared_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (shared == MAP_FAILED) {
		return -errno;
	}
	mirror->shared = shared;
	mirror->counts = mirror_counts(shared, mirror->owner);
	mirror->region_shift = (unsigned)__builtin_ctzll(shared->super.region_size);
	return 0;
}

/* Everything that can fail; what was made before is undone. */
static int set_up(struct mirror_bdev *mirror, const struct mirror_setup *setup)
{
	int error;

	mirror->event_fd = dup(setup->event_fd);
	if (mirror->event_fd < 0) {
		return -errno;
	}
	error = map_shared(mirror, setup->shared_fd);
	if (!error) {
		error = mirror_log_init(mirror);
		if (!error) {
			error = mirror_sync_init(mirror);
			if (!error) {
				return 0;
			}
			mirror_log_free(mirror);
		}
		munmap(mirror->shared, mirror->shared_size);
	}
	close(mirror->event_fd);
	return error;
}

struct bdev *mirror_bdev_open(struct reactor *reactor, uint64_t id, uint32_t slot,
			      const struct mirror_setup *setup)
{
	struct stacked_setup stacked = {
	    .reactor = reactor,
	    .ops = &mirror_ops,
	    .id = id,
	    .slot = slot,
	    .block_size = setup->bases[0]->block_size,
	    .block_count = setup->block_count,
	    .bases = setup->bases,
	    .base_count = setup->base_count,
	};
	struct mirror_bdev *mirror = stacked_create(sizeof(*mirror), &stacked);
	int error;

	if (!mirror) {
		return NULL;
	}
	mirror->owner = setup->owner;
	error = set_up(mirror, setup);
	if (error) {
		stacked_close(&mirror->stacked.bdev);
		errno = -error;
		return NULL;
	}
	/* As zeroes, which the legs can write. */
	bdev_set_supported(&mirror->stacked.bdev, mirror->stacked.bdev.native | 1U << BDEV_UNMAP, false);
	mirror->stacked.children.resume = mirror_go_on;
	mirror->stacked.children.ended = mirror_ended;
	for (uint32_t i = 0; i < setup->base_count; i++) {
		mirror->legs[setup->places[i]] = setup->bases[i];
	}
	return &mirror->stacked.bdev;
}
