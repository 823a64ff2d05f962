/*
 * Making legs the same, region by region: lock the region, wait until nobody writes to it, copy what the first
 * active leg has to those that may differ. Where active legs are only SUSPECT they mostly are the same: they
 * are compared, and written where they are not.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bdev/mirror_disk.h"

#define CHUNK (256U << 10) /* bytes copied at a time */
#define POLL_NS 50000	   /* how often to look whether writes are over */
#define ALIGNMENT 4096

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

static void next_chunk(struct mirror_bdev *mirror);

/* At the end of the turn: legs that answer at once would have us nest. */
static void defer(struct mirror_bdev *mirror)
{
	reactor_defer(mirror->stacked.bdev.reactor, &mirror->sync.work);
}

static void unlock(struct mirror_bdev *mirror, uint32_t done)
{
	struct mirror_sync *sync = &mirror->sync;

	if (sync->locked) {
		mirror_clear(mirror->shared, sync->region, done | MIRROR_LOCKED);
		sync->locked = false;
	}
}

static void end_sync(struct mirror_bdev *mirror, int status)
{
	struct mirror_sync *sync = &mirror->sync;
	struct bdev *bdev = &mirror->stacked.bdev;

	unlock(mirror, 0);
	owned_release(&mirror->shared->syncer);
	sync->active = false;
	reactor_notify(bdev->reactor, sync->id, NOTICE_DRAINED, status, "synced");
	bdev_release(bdev);
}

/* --- one chunk -------------------------------------------------------------------------------------- */

static void submit(struct mirror_bdev *mirror, uint32_t place, uint8_t op, uint8_t *buffer,
		   void (*done)(struct bdev_io *io, int status))
{
	struct mirror_sync *sync = &mirror->sync;

	sync->iov = (struct iovec){buffer, sync->length};
	sync->io = (struct bdev_io){
	    .bdev = mirror->legs[place],
	    .done = done,
	    .op = op,
	    .iov = &sync->iov,
	    .iovcnt = op == BDEV_FLUSH ? 0 : 1,
	    .offset = op == BDEV_FLUSH ? 0 : sync->position + mirror->shared->super.data_offset,
	    .length = op == BDEV_FLUSH ? 0 : sync->length,
	};
	bdev_submit(&sync->io);
}

static uint32_t source_of(const struct mirror_bdev *mirror)
{
	return (uint32_t)__builtin_ctzll(mirror_active(mirror->shared));
}

/* The next leg that may differ here, MIRROR_LEGS if there is none. */
static uint32_t next_target(const struct mirror_bdev *mirror, uint32_t place)
{
	const struct mirror_shared *shared = mirror->shared;
	uint64_t legs = mirror_written(shared) & ~mirror_active(shared);

	if (mirror_flags(shared, mirror->sync.region) & MIRROR_SUSPECT) {
		legs = mirror_written(shared) & ~MIRROR_BIT(source_of(mirror));
	}
	while (place < MIRROR_LEGS && !(legs & MIRROR_BIT(place) && mirror->legs[place])) {
		place++;
	}
	return place;
}

static void target_done(struct bdev_io *io, int status);

/* Bring the chunk to the target, or to the next one; then there is another chunk. */
static void copy(struct mirror_bdev *mirror)
{
	struct mirror_sync *sync = &mirror->sync;

	sync->target = next_target(mirror, sync->target);
	if (sync->target == MIRROR_LEGS) {
		sync->position += sync->length;
		defer(mirror);
		return;
	}
	sync->comparing = mirror_active(mirror->shared) & MIRROR_BIT(sync->target);
	submit(mirror, sync->target, sync->comparing ? BDEV_READ : BDEV_WRITE,
	       sync->comparing ? sync->compared : sync->source, target_done);
}

static void target_done(struct bdev_io *io, int status)
{
	struct mirror_bdev *mirror = container_of(io, struct mirror_bdev, sync.io);
	struct mirror_sync *sync = &mirror->sync;

	if (status && !mirror_drop(mirror, sync->target)) {
		end_sync(mirror, status);
		return;
	}
	if (!status && sync->comparing && memcmp(sync->source, sync->compared, sync->length)) {
		sync->comparing = false;
		submit(mirror, sync->target, BDEV_WRITE, sync->source, target_done);
		return;
	}
	sync->target++;
	copy(mirror);
}

static void source_read(struct bdev_io *io, int status)
{
	struct mirror_bdev *mirror = container_of(io, struct mirror_bdev, sync.io);
	struct mirror_sync *sync = &mirror->sync;

	if (!status) {
		sync->target = 0;
		copy(mirror);
	} else if (mirror_drop(mirror, sync->target)) {
		/* Another leg is the first now: all of the region has to be as it is there. */
		sync->position = sync->region << mirror->region_shift;
		defer(mirror);
	} else {
		end_sync(mirror, status);
	}
}

/* --- regions ---------------------------------------------------------------------------------------- */

/* Lock the next region that is to be done, and have the timer look whether writes to it are over. */
static void lock_region(struct mirror_bdev *mirror)
{
	struct mirror_sync *sync = &mirror->sync;
	struct bdev *bdev = &mirror->stacked.bdev;

	sync->region = mirror_find(mirror->shared, sync->region, MIRROR_SUSPECT | MIRROR_STALE);
	if (sync->region >= sync->end || bdev->removed) {
		end_sync(mirror, bdev->removed ? -ENODEV : 0);
		return;
	}
	mirror_set(mirror->shared, sync->region, MIRROR_LOCKED);
	sync->locked = true;
	sync->position = sync->region << mirror->region_shift;
	defer(mirror);
}

static void next_chunk(struct mirror_bdev *mirror)
{
	struct mirror_sync *sync = &mirror->sync;
	struct bdev *bdev = &mirror->stacked.bdev;
	uint64_t end = (sync->region + 1) << mirror->region_shift;

	end = end < bdev->size ? end : bdev->size;
	if (sync->position >= end) {
		unlock(mirror, MIRROR_SUSPECT | MIRROR_STALE);
		lock_region(mirror);
		return;
	}
	sync->length = end - sync->position < CHUNK ? end - sync->position : CHUNK;
	sync->target = source_of(mirror);
	if (!mirror->legs[sync->target]) {
		end_sync(mirror, -ENODEV);
		return;
	}
	submit(mirror, sync->target, BDEV_READ, sync->source, source_read);
}

static void work(struct deferred *deferred)
{
	struct mirror_bdev *mirror = container_of(deferred, struct mirror_bdev, sync.work);
	struct mirror_sync *sync = &mirror->sync;
	struct reactor *reactor = mirror->stacked.bdev.reactor;

	if (!sync->locked) {
		lock_region(mirror);
	} else if (sync->position == sync->region << mirror->region_shift &&
		   !mirror_is_quiet(mirror->shared, sync->region)) {
		if (timer_set(reactor, &sync->timer, reactor_now(reactor) + reactor_ns_to_ticks(POLL_NS))) {
			end_sync(mirror, -ENOMEM);
		}
	} else {
		next_chunk(mirror);
	}
}

static void look(struct timer *timer)
{
	defer(container_of(timer, struct mirror_bdev, sync.timer));
}

int mirror_sync_start(struct bdev *bdev, uint64_t id, uint64_t first, uint64_t end)
{
	struct mirror_bdev *mirror = (struct mirror_bdev *)bdev;
	struct mirror_sync *sync = &mirror->sync;

	if (sync->active || !owned_take(&mirror->shared->syncer, mirror->owner)) {
		return -EBUSY;
	}
	sync->id = id;
	sync->region = first;
	sync->end = end < mirror->shared->regions ? end : mirror->shared->regions;
	sync->active = true;
	bdev_hold(bdev);
	defer(mirror);
	return 0;
}

int mirror_sync_init(struct mirror_bdev *mirror)
{
	mirror->sync.source = aligned_alloc(ALIGNMENT, (size_t)2 * CHUNK);
	if (!mirror->sync.source) {
		return -ENOMEM;
	}
	mirror->sync.compared = mirror->sync.source + CHUNK;
	mirror->sync.timer.fire = look;
	mirror->sync.work.run = work;
	return 0;
}

void mirror_sync_free(struct mirror_bdev *mirror)
{
	struct reactor *reactor = mirror->stacked.bdev.reactor;

	timer_clear(reactor, &mirror->sync.timer);
	reactor_cancel(reactor, &mirror->sync.work);
	free(mirror->sync.source);
}
