/*
 * The state of a request says whose it is: the reactor's while it is FREE or ANSWERED, the other process's
 * while it is ASKED or TAKEN. Each side writes its part before it hands the request over, by a store with
 * release.
 *
 * What the process of the class writes is not trusted: the reactor keeps to itself which request a slot has,
 * how long it is and where the data goes.
 */
#include "bdev/python.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bdev/bounce.h"

#define AREA_SIZE (PYTHON_DATA + (size_t)PYTHON_SLOTS * PYTHON_PIECE)

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

struct python_area {
	struct python_request requests[PYTHON_SLOTS];
};

_Static_assert(sizeof(struct python_area) <= PYTHON_DATA, "requests stand before the buffers");

struct python_bdev {
	struct bdev bdev;
	struct bounce bounce;
	struct python_area *area;
	struct fd_watch answers;
	struct deferred ask;
	struct timer timer;
	uint64_t timeout; /* ticks */
	uint64_t used;	  /* 1 << slot: those with a request, or abandoned */
	int memory_fd, ask_fd;
};

_Static_assert(PYTHON_SLOTS <= 64, "slots in use are a word");

static uint32_t load_state(const struct python_request *request)
{
	return __atomic_load_n(&request->state, __ATOMIC_ACQUIRE);
}

static void store_state(struct python_request *request, enum python_state state)
{
	__atomic_store_n(&request->state, state, __ATOMIC_RELEASE);
}

static bool change_state(struct python_request *request, uint32_t from, enum python_state to)
{
	return __atomic_compare_exchange_n(&request->state, &from, to, false, __ATOMIC_ACQ_REL,
					   __ATOMIC_ACQUIRE);
}

/* --- the reactor's side ------------------------------------------------------------------------------ */

static void start(struct bounce *bounce, struct bounce_slot *slot)
{
	struct python_bdev *disk = container_of(bounce, struct python_bdev, bounce);
	struct python_request *request = &disk->area->requests[slot->index];

	request->offset = slot->io->offset;
	request->length = slot->io->length;
	request->op = slot->io->op;
	request->flags = slot->io->flags;
	store_state(request, PYTHON_ASKED);
	disk->used |= 1ULL << slot->index;
	reactor_defer(disk->bdev.reactor, &disk->ask);
}

/* One signal for all requests of a turn. */
static void ask(struct deferred *deferred)
{
	static const uint64_t one = 1;
	const struct python_bdev *disk = container_of(deferred, struct python_bdev, ask);
	ssize_t written = write(disk->ask_fd, &one, sizeof(one));

	(void)written; /* a full counter is a signal, too */
}

static void take_answer(struct python_bdev *disk, struct bounce_slot *slot)
{
	struct python_request *request = &disk->area->requests[slot->index];
	int status = __atomic_load_n(&request->status, __ATOMIC_RELAXED);

	disk->used &= ~(1ULL << slot->index);
	store_state(request, PYTHON_FREE);
	if (slot->io) {
		bounce_done(&disk->bounce, slot, status > 0 || status < -4095 ? -EIO : status);
	} else {
		bounce_recover(&disk->bounce, slot);
	}
}

static void answered(struct fd_watch *watch)
{
	struct python_bdev *disk = container_of(watch, struct python_bdev, answers);

	for (uint64_t left = disk->used; left; left &= left - 1) {
		uint32_t index = (uint32_t)__builtin_ctzll(left);

		if (load_state(&disk->area->requests[index]) == PYTHON_ANSWERED) {
			take_answer(disk, &disk->bounce.slots[index]);
		}
	}
}

/* The class has had its time for the request of @slot. */
static void give_up(struct python_bdev *disk, struct bounce_slot *slot)
{
	struct python_request *request = &disk->area->requests[slot->index];

	if (change_state(request, PYTHON_ASKED, PYTHON_FREE)) {
		disk->used &= ~(1ULL << slot->index);
		bounce_done(&disk->bounce, slot, -ETIMEDOUT); /* it was not begun, and will not be */
	} else if (change_state(request, PYTHON_TAKEN, PYTHON_ABANDONED)) {
		bounce_abandon(&disk->bounce, slot, -ETIMEDOUT);
	} else {
		take_answer(disk, slot); /* a moment ago */
	}
}

static void expire(struct timer *timer)
{
	struct python_bdev *disk = container_of(timer, struct python_bdev, timer);
	uint64_t limit = reactor_now(disk->bdev.reactor) - disk->timeout + 1;
	uint64_t oldest = bounce_fail_waiting(&disk->bounce, limit, -ETIMEDOUT);

	for (uint64_t left = disk->used; left; left &= left - 1) {
		struct bounce_slot *slot = &disk->bounce.slots[__builtin_ctzll(left)];

		if (slot->io && slot->io->submitted < limit) {
			give_up(disk, slot);
		}
		if (slot->io && (!oldest || slot->io->submitted < oldest)) {
			oldest = slot->io->submitted;
		}
	}
	if (oldest) {
		(void)timer_set(disk->bdev.reactor, timer, oldest + disk->timeout);
	}
}

static void python_submit(struct bdev *bdev, struct bdev_io *io)
{
	struct python_bdev *disk = (struct python_bdev *)bdev;

	if (io->op == BDEV_RESET) {
		bdev_complete_when_quiet(io);
		return;
	}
	if (!disk->timer.place) {
		/* Without memory for a timer a request may wait for longer than it should. */
		(void)timer_set(bdev->reactor, &disk->timer, io->submitted + disk->timeout);
	}
	bounce_submit(&disk->bounce, io);
}

/* What the class has begun goes on. */
static int python_abort(struct bdev *bdev, struct bdev_io *io)
{
	struct python_bdev *disk = (struct python_bdev *)bdev;

	for (uint64_t left = disk->used; left; left &= left - 1) {
		struct bounce_slot *slot = &disk->bounce.slots[__builtin_ctzll(left)];

		if (slot->io == io &&
		    change_state(&disk->area->requests[slot->index], PYTHON_ASKED, PYTHON_FREE)) {
			disk->used &= ~(1ULL << slot->index);
			bounce_done(&disk->bounce, slot, -ECANCELED);
			return 0;
		}
	}
	return bounce_abort(&disk->bounce, io);
}

static void python_remove(struct bdev *bdev)
{
	bounce_fail_waiting(&((struct python_bdev *)bdev)->bounce, UINT64_MAX, -ENODEV);
}

static void python_close(struct bdev *bdev)
{
	struct python_bdev *disk = (struct python_bdev *)bdev;

	timer_clear(bdev->reactor, &disk->timer);
	reactor_cancel(bdev->reactor, &disk->ask);
	fd_watch_stop(bdev->reactor, &disk->answers);
	munmap(disk->area, AREA_SIZE);
	bounce_free(&disk->bounce);
	close(disk->memory_fd);
	close(disk->ask_fd);
	close(disk->answers.fd);
	free(disk);
}

static const struct bdev_ops python_ops = {
    .submit = python_submit,
    .remove = python_remove,
    .abort = python_abort,
    .close = python_close,
};

static struct python_area *map_area(int fd)
{
	void *area = mmap(NULL, AREA_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	return area == MAP_FAILED ? NULL : area;
}

struct bdev *python_bdev_open(struct reactor *reactor, uint64_t id, uint32_t slot,
			      const struct python_setup *setup)
{
	struct python_bdev *disk = calloc(1, sizeof(*disk));
	int rc;

	if (!disk) {
		return NULL;
	}
	disk->area = map_area(setup->memory_fd);
	if (!disk->area) {
		rc = -errno;
		goto no_area;
	}
	rc = bounce_init(&disk->bounce, (uint8_t *)disk->area + PYTHON_DATA, PYTHON_SLOTS, PYTHON_PIECE, false,
			 start);
	if (rc) {
		goto no_slots;
	}
	disk->answers = (struct fd_watch){.ready = answered, .fd = setup->answer_fd};
	rc = fd_watch_start(reactor, &disk->answers);
	if (rc) {
		goto no_watch;
	}
	bdev_init(&disk->bdev, &python_ops, reactor, id, slot, setup->block_size, setup->block_count,
		  setup->supported, setup->readonly);
	disk->memory_fd = setup->memory_fd;
	disk->ask_fd = setup->ask_fd;
	disk->ask.run = ask;
	disk->timer.fire = expire;
	disk->timeout = reactor_ns_to_ticks(setup->timeout_ns);
	rc = bounce_limit(&disk->bounce, &disk->bdev, (struct bdev_limits){0});
	if (rc) {
		goto no_limits;
	}
	return &disk->bdev;
no_limits:
	fd_watch_stop(reactor, &disk->answers);
no_watch:
	bounce_free(&disk->bounce);
no_slots:
	munmap(disk->area, AREA_SIZE);
no_area:
	free(disk);
	errno = -rc;
	return NULL;
}

/* --- the side of the class --------------------------------------------------------------------------- */

struct python_area *python_area_map(int memory_fd)
{
	struct python_area *area = map_area(memory_fd);

	for (uint32_t i = 0; area && i < PYTHON_SLOTS; i++) {
		/* Whoever had it is dead: what was given up has ended by that, the rest begins anew. */
		change_state(&area->requests[i], PYTHON_TAKEN, PYTHON_ASKED);
		change_state(&area->requests[i], PYTHON_ABANDONED, PYTHON_ANSWERED);
	}
	return area;
}

void python_area_unmap(struct python_area *area)
{
	munmap(area, AREA_SIZE);
}

int python_area_take(struct python_area *area, struct python_request *copy)
{
	for (uint32_t i = 0; i < PYTHON_SLOTS; i++) {
		if (change_state(&area->requests[i], PYTHON_ASKED, PYTHON_TAKEN)) {
			*copy = area->requests[i];
			return (int)i;
		}
	}
	return -1;
}

void *python_area_data(struct python_area *area, uint32_t slot)
{
	return (uint8_t *)area + PYTHON_DATA + (size_t)slot * PYTHON_PIECE;
}

void python_area_answer(struct python_area *area, uint32_t slot, int status)
{
	area->requests[slot].status = status;
	store_state(&area->requests[slot], PYTHON_ANSWERED);
}
