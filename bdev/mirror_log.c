/*
 * The write-intent log and the superblocks: blocks that are written to every leg, one at a time by a handle,
 * and by one reactor at a time, who holds the block's lock in shared memory.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bdev/mirror_disk.h"

#define RETRY_NS 100000 /* while another reactor holds what we need */
#define ALIGNMENT 4096

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

/* What became of an attempt to start something. */
enum next {
	NOTHING, /* there is nothing to do */
	STARTED, /* or ended: there may be more */
	BLOCKED, /* another reactor holds a lock */
};

static void go_on(struct mirror_bdev *mirror);

void mirror_defer(struct mirror_bdev *mirror)
{
	reactor_defer(mirror->stacked.bdev.reactor, &mirror->work);
}

bool mirror_look_again(struct mirror_bdev *mirror)
{
	struct reactor *reactor = mirror->stacked.bdev.reactor;

	return mirror->retry.place ||
	       !timer_set(reactor, &mirror->retry, reactor_now(reactor) + reactor_ns_to_ticks(RETRY_NS));
}

/* Fail, or answer, all that wait in a list. */
static void end_all(struct mirror_bdev *mirror, struct mirror_list *list, int status)
{
	struct bdev_io *io = list->first, *next;

	mirror_list_init(list);
	for (; io; io = next) {
		next = io->next;
		if (status) {
			mirror_fail(mirror, io, status);
		} else {
			bdev_complete(io, 0);
		}
	}
}

static void end_job(struct mirror_bdev *mirror, int status)
{
	struct bdev *bdev = &mirror->stacked.bdev;

	mirror->job.active = false;
	reactor_notify(bdev->reactor, mirror->job.id, NOTICE_DRAINED, status, "done");
	bdev_release(bdev);
}

/* --- one block to every leg ------------------------------------------------------------------------- */

static void meta_ended(struct mirror_bdev *mirror)
{
	struct mirror_meta *meta = &mirror->meta;
	int status = meta->ok & mirror_active(mirror->shared) ? 0 : -EIO;

	if (--meta->pending) {
		return;
	}
	for (uint32_t place = 0; place < MIRROR_LEGS; place++) {
		if (meta->failed & MIRROR_BIT(place) && !mirror_drop(mirror, place)) {
			status = -EIO;
		}
	}
	mirror->writing = false;
	meta->done(mirror, status);
}

static void meta_done(struct bdev_io *io, int status)
{
	struct mirror_bdev *mirror = io->scratch[1];
	struct mirror_meta *meta = &mirror->meta;
	uint64_t bit = MIRROR_BIT(io - meta->io);

	*(status ? &meta->failed : &meta->ok) |= bit;
	meta_ended(mirror);
}

/* Do @op on every leg, with a block of its own each, or the first one's for all; then @done. */
static void on_legs(struct mirror_bdev *mirror, uint8_t op, uint64_t offset, bool same,
		    void (*done)(struct mirror_bdev *mirror, int status))
{
	struct mirror_meta *meta = &mirror->meta;
	uint64_t legs = mirror_written(mirror->shared);
	uint32_t block_size = mirror->shared->super.block_size;

	mirror->writing = true;
	meta->ok = meta->failed = 0;
	meta->pending = 1;
	meta->done = done;
	for (uint32_t place = 0; place < MIRROR_LEGS; place++) {
		if (!(legs & MIRROR_BIT(place))) {
			continue;
		}
		if (!mirror->legs[place]) {
			meta->failed |= MIRROR_BIT(place);
			continue;
		}
		if (!(mirror->legs[place]->supported & 1U << op)) { /* nothing to be flushed */
			meta->ok |= MIRROR_BIT(place);
			continue;
		}
		meta->iov[place] = (struct iovec){meta->image + (same ? 0 : place * ALIGNMENT), block_size};
		meta->io[place] = (struct bdev_io){
		    .bdev = mirror->legs[place],
		    .done = meta_done,
		    .op = op,
		    .flags = BDEV_IO_FUA,
		    .iov = &meta->iov[place],
		    .iovcnt = op == BDEV_WRITE ? 1 : 0,
		    .offset = offset,
		    .length = op == BDEV_WRITE ? block_size : 0,
		};
		meta->io[place].scratch[1] = mirror;
		meta->pending++;
		bdev_submit(&meta->io[place]);
	}
	meta_ended(mirror);
}

/* --- superblocks ------------------------------------------------------------------------------------ */

static void super_written(struct mirror_bdev *mirror, int status)
{
	struct mirror_shared *shared = mirror->shared;

	if (!status) {
		__atomic_store_n(&shared->written, mirror->generation, __ATOMIC_SEQ_CST);
	}
	owned_release(&shared->super_lock);
	if (status) {
		end_all(mirror, &mirror->answering, status);
		if (mirror->job.active) {
			end_job(mirror, status);
		}
	}
	go_on(mirror);
}

static void write_super(struct mirror_bdev *mirror)
{
	struct mirror_shared *shared = mirror->shared;
	uint64_t legs;

	mirror->generation = __atomic_load_n(&shared->changed, __ATOMIC_SEQ_CST);
	legs = mirror_legs(shared);
	for (uint32_t place = 0; place < MIRROR_LEGS; place++) {
		struct mirror_super *super = (struct mirror_super *)(mirror->meta.image + place * ALIGNMENT);

		memset(super, 0, ALIGNMENT);
		*super = shared->super;
		super->events += mirror->generation;
		super->place = place;
		for (uint32_t i = 0; i < MIRROR_LEGS; i++) {
			super->member[i].state = legs & MIRROR_BIT(i)		      ? MIRROR_ACTIVE
						 : legs & MIRROR_BIT(i + MIRROR_LEGS) ? MIRROR_REBUILDING
										      : MIRROR_MISSING;
		}
		super->checksum =
		    bitmap_checksum(&super->version, sizeof(*super) - offsetof(struct mirror_super, version));
	}
	on_legs(mirror, BDEV_WRITE, 0, false, super_written);
}

/* --- the log ---------------------------------------------------------------------------------------- */

static struct bitmap_block *image_of(struct mirror_bdev *mirror)
{
	return (struct bitmap_block *)mirror->meta.image;
}

/* Fill in the block whose lock we hold. */
static void make_image(struct mirror_bdev *mirror)
{
	const struct mirror_shared *shared = mirror->shared;
	struct bitmap_block *image = image_of(mirror);
	uint32_t bits = bitmap_bits(shared->super.block_size);
	uint64_t first = mirror->block * bits;

	memset(image, 0, shared->super.block_size);
	for (uint32_t i = 0; i < bits && first + i < shared->regions; i++) {
		if (mirror_flags(shared, first + i) & (MIRROR_DIRTY | MIRROR_WANTED | MIRROR_SUSPECT)) {
			image->words[i / 64] |= 1ULL << (i % 64);
		}
	}
	bitmap_seal(image, (uint32_t)mirror->block, shared->super.block_size);
}

/* The bits of the image are on the legs. */
static void settle_image(struct mirror_bdev *mirror)
{
	struct mirror_shared *shared = mirror->shared;
	const struct bitmap_block *image = image_of(mirror);
	uint32_t bits = bitmap_bits(shared->super.block_size);
	uint64_t first = mirror->block * bits;

	for (uint32_t i = 0; i < bits && first + i < shared->regions; i++) {
		if (image->words[i / 64] >> (i % 64) & 1) {
			mirror_set(shared, first + i, MIRROR_DIRTY);
			mirror_clear(shared, first + i, MIRROR_WANTED);
		}
	}
}

static void block_written(struct mirror_bdev *mirror, int status)
{
	if (!status) {
		settle_image(mirror);
	}
	owned_release(mirror_lock(mirror->shared, mirror->block));
	if (status) {
		end_all(mirror, &mirror->logging, status);
	} else {
		mirror_tell(mirror); /* it is to be cleaned some time */
	}
	go_on(mirror);
}

/* Write the block whose lock we hold. */
static void write_image(struct mirror_bdev *mirror, void (*done)(struct mirror_bdev *mirror, int status))
{
	const struct mirror_super *super = &mirror->shared->super;

	make_image(mirror);
	on_legs(mirror, BDEV_WRITE, super->log_offset + mirror->block * super->block_size, true, done);
}

/* The first region of a request whose bit is not set; its window's end if there is none. */
static uint64_t wanted(const struct mirror_bdev *mirror, const struct bdev_io *io, uint64_t *end)
{
	uint64_t region;

	mirror_window(mirror, io, &region, end);
	while (region < *end && mirror_flags(mirror->shared, region) & MIRROR_DIRTY) {
		region++;
	}
	return region;
}

/* --- work on the log: struct mirror_job ------------------------------------------------------------- */

static void job_block_written(struct mirror_bdev *mirror, int status)
{
	if (!status) {
		settle_image(mirror);
	}
	owned_release(mirror_lock(mirror->shared, mirror->block));
	if (status) {
		end_job(mirror, status);
	}
	go_on(mirror);
}

static void job_flushed(struct mirror_bdev *mirror, int status)
{
	mirror->job.flushed = true;
	if (status) {
		end_job(mirror, status);
	}
	go_on(mirror);
}

/*
 * Before the flush: regions that nobody is writing to grow old. After it, those that were old and still are
 * have nothing that is not durable.
 */
static bool grow_old(struct mirror_shared *shared)
{
	bool old = false;

	for (uint64_t i = mirror_find(shared, 0, MIRROR_DIRTY); i < shared->regions;
	     i = mirror_find(shared, i + 1, MIRROR_DIRTY)) {
		uint8_t flags = mirror_flags(shared, i);

		if (flags & MIRROR_SUSPECT || !mirror_is_quiet(shared, i)) {
			continue;
		}
		if (flags & MIRROR_USED) {
			mirror_set(shared, i, MIRROR_FRESH);
			mirror_clear(shared, i, MIRROR_USED);
		} else {
			mirror_clear(shared, i, MIRROR_FRESH);
			old = true;
		}
	}
	return old;
}

/* Clear what is old in the block whose lock we hold; false if nothing is. */
static bool clean_block(struct mirror_shared *shared, uint64_t block)
{
	uint32_t bits = bitmap_bits(shared->super.block_size);
	bool cleaned = false;

	for (uint64_t i = block * bits; i < (block + 1) * bits && i < shared->regions; i++) {
		uint8_t old = mirror_flags(shared, i) & MIRROR_STALE, new = old;

		old |= MIRROR_DIRTY;
		if (!__atomic_compare_exchange_n(mirror_flag_at(shared, i), &old, new, false, __ATOMIC_SEQ_CST,
						 __ATOMIC_SEQ_CST)) {
			continue;
		}
		if (mirror_is_quiet(shared, i) && !(mirror_flags(shared, i) & MIRROR_USED)) {
			cleaned = true;
		} else {
			mirror_set(shared, i, MIRROR_DIRTY); /* a writer came, and may have seen the bit */
		}
	}
	return cleaned;
}

static enum next step_job(struct mirror_bdev *mirror)
{
	struct mirror_shared *shared = mirror->shared;
	struct mirror_job *job = &mirror->job;

	if (!job->active) {
		return NOTHING;
	}
	if (job->kind == MIRROR_WRITE_ALL && job->block == shared->blocks) {
		job->kind = MIRROR_SETTLE;
		__atomic_fetch_add(&shared->changed, 1, __ATOMIC_SEQ_CST);
		return STARTED;
	}
	if (job->kind == MIRROR_SETTLE || job->block == shared->blocks ||
	    (job->kind == MIRROR_FLUSH && job->flushed)) {
		end_job(mirror, 0);
		return STARTED;
	}
	if (job->kind == MIRROR_CLEAN && !mirror_is_whole(shared)) { /* or not any more, since the flush */
		end_job(mirror, 0);
		return STARTED;
	}
	if (job->kind != MIRROR_WRITE_ALL && !job->flushed) {
		if (job->kind == MIRROR_FLUSH || grow_old(shared)) {
			on_legs(mirror, BDEV_FLUSH, 0, true, job_flushed);
		} else {
			end_job(mirror, 0);
		}
		return STARTED;
	}
	if (job->kind == MIRROR_CLEAN) { /* on to the next block with bits */
		uint32_t bits = bitmap_bits(shared->super.block_size);
		uint64_t region = mirror_find(shared, job->block * bits, MIRROR_DIRTY);

		if (region == shared->regions) {
			end_job(mirror, 0);
			return STARTED;
		}
		job->block = region / bits;
	}
	if (!owned_take(mirror_lock(shared, job->block), mirror->owner)) {
		return BLOCKED;
	}
	mirror->block = job->block++;
	if (job->kind == MIRROR_CLEAN && !clean_block(shared, mirror->block)) {
		owned_release(mirror_lock(shared, mirror->block));
		return STARTED;
	}
	write_image(mirror, job_block_written);
	return STARTED;
}

int mirror_job_start(struct bdev *bdev, uint64_t id, enum mirror_job_kind kind)
{
	struct mirror_bdev *mirror = (struct mirror_bdev *)bdev;

	if (mirror->job.active) {
		return -EBUSY;
	}
	mirror->job = (struct mirror_job){.id = id, .kind = kind, .active = true};
	bdev_hold(bdev);
	mirror_defer(mirror);
	return 0;
}

/* --- what comes next -------------------------------------------------------------------------------- */

/* What is held by another reactor; without memory for a timer whoever waits for it fails. */
static void wait_for_lock(struct mirror_bdev *mirror)
{
	if (!mirror_look_again(mirror)) {
		end_all(mirror, &mirror->answering, -ENOMEM);
		end_all(mirror, &mirror->logging, -ENOMEM);
		if (mirror->job.active) {
			end_job(mirror, -ENOMEM);
		}
	}
}

/* Superblocks first: what was answered depends on them. */
static enum next next_super(struct mirror_bdev *mirror)
{
	struct mirror_shared *shared = mirror->shared;

	if (!mirror->answering.first && !(mirror->job.active && mirror->job.kind == MIRROR_SETTLE)) {
		return NOTHING;
	}
	if (__atomic_load_n(&shared->written, __ATOMIC_SEQ_CST) ==
	    __atomic_load_n(&shared->changed, __ATOMIC_SEQ_CST)) {
		end_all(mirror, &mirror->answering, 0);
		return NOTHING;
	}
	if (!owned_take(&shared->super_lock, mirror->owner)) {
		return BLOCKED;
	}
	write_super(mirror);
	return STARTED;
}

/* Then bits that writes wait for; those that have all of theirs go. */
static enum next next_bits(struct mirror_bdev *mirror)
{
	while (mirror->logging.first) {
		struct bdev_io *io = mirror->logging.first;
		uint64_t end, region = wanted(mirror, io, &end);

		if (region < end) {
			uint64_t block = region / bitmap_bits(mirror->shared->super.block_size);

			if (!owned_take(mirror_lock(mirror->shared, block), mirror->owner)) {
				return BLOCKED;
			}
			mirror->block = block;
			write_image(mirror, block_written);
			return STARTED;
		}
		mirror->logging.first = io->next;
		if (!io->next) {
			mirror->logging.end = &mirror->logging.first;
		}
		mirror_send(mirror, io);
	}
	return NOTHING;
}

/* Start what is to be written next, as long as nothing is. */
static void go_on(struct mirror_bdev *mirror)
{
	if (mirror->busy) {
		return; /* what was started has ended at once: it is the loop below that goes on */
	}
	mirror->busy = true;
	while (!mirror->writing) {
		enum next next = next_super(mirror);

		if (next == NOTHING) {
			next = next_bits(mirror);
		}
		if (next == NOTHING) {
			next = step_job(mirror);
		}
		if (next == BLOCKED) {
			wait_for_lock(mirror);
		}
		if (next != STARTED) {
			break;
		}
	}
	mirror->busy = false;
}

static void work(struct deferred *deferred)
{
	go_on(container_of(deferred, struct mirror_bdev, work));
}

static void retry(struct timer *timer)
{
	struct mirror_bdev *mirror = container_of(timer, struct mirror_bdev, retry);
	struct bdev_io *io = mirror->contended.first, *next;

	mirror_list_init(&mirror->contended);
	for (; io; io = next) {
		next = io->next;
		mirror_go_on(&mirror->stacked.bdev, io);
	}
	mirror_defer(mirror);
}

int mirror_log_init(struct mirror_bdev *mirror)
{
	mirror->meta.image = aligned_alloc(ALIGNMENT, (size_t)MIRROR_LEGS * ALIGNMENT);
	if (!mirror->meta.image) {
		return -ENOMEM;
	}
	mirror_list_init(&mirror->contended);
	mirror_list_init(&mirror->logging);
	mirror_list_init(&mirror->answering);
	mirror->retry.fire = retry;
	mirror->work.run = work;
	return 0;
}

void mirror_log_free(struct mirror_bdev *mirror)
{
	struct reactor *reactor = mirror->stacked.bdev.reactor;

	timer_clear(reactor, &mirror->retry);
	reactor_cancel(reactor, &mirror->work);
	free(mirror->meta.image);
}
