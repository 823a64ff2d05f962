/*
 * The server is somebody else's, and not trusted: front_queue_reap() checks what it puts into the used ring,
 * answers are copied before they are looked at, and how much data there is comes from our own request. The
 * memory that it writes is shared with nobody else, and another connection has another memory: what a server
 * does late, after it was given up, reaches no request of ours.
 */
#include "vhost/initiator.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "vhost/initiator_internal.h"

#define BATCH 32
#define LATER_NS 1000000 /* until a busy device is asked again */
#define PAGE 4096ULL

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

static struct initiator *initiators; /* of this process */

static uint32_t slots_of(uint32_t queue_size)
{
	uint32_t count = queue_size / INITIATOR_BUFFERS;

	return count < INITIATOR_SLOTS ? count : INITIATOR_SLOTS;
}

static uint64_t align(uint64_t at, uint64_t to)
{
	return (at + to - 1) & ~(to - 1);
}

struct initiator_layout initiator_layout(uint32_t queue_size)
{
	struct initiator_layout layout = {.desc = 0};

	layout.avail = 16ULL * queue_size;
	layout.used = align(layout.avail + 6 + 2ULL * queue_size, 64);
	layout.headers = align(layout.used + 6 + 8ULL * queue_size, INITIATOR_HEADER);
	layout.data = align(layout.headers + (uint64_t)slots_of(queue_size) * INITIATOR_HEADER, PAGE);
	layout.size = layout.data + (uint64_t)slots_of(queue_size) * INITIATOR_PIECE;
	return layout;
}

/* --- requests ---------------------------------------------------------------------------------------- */

static void send(struct initiator *disk, struct bounce_slot *slot)
{
	struct front_buffer buffers[INITIATOR_BUFFERS];
	uint32_t count;
	int head;

	if (initiator_is_flush(disk, slot) && !disk->setup.flush) {
		bounce_done(&disk->bounce, slot, 0); /* what is written is durable */
		return;
	}
	count = disk->format->ask(disk, slot, buffers);
	/* There are descriptors for as many requests as there are slots. */
	head = unlikely(disk->broken) ? -EIO : front_queue_add(disk->queue, buffers, count, NULL, 0);
	if (unlikely(head < 0)) {
		bounce_done(&disk->bounce, slot, -EIO);
		return;
	}
	disk->slot_of[head] = (uint8_t)slot->index;
	reactor_defer(disk->bdev.reactor, &disk->publish);
}

static void start(struct bounce *bounce, struct bounce_slot *slot)
{
	struct initiator *disk = container_of(bounce, struct initiator, bounce);

	disk->attempts[slot->index] = 0;
	disk->flushing &= ~(1ULL << slot->index);
	send(disk, slot);
}

static void publish(struct deferred *deferred)
{
	struct initiator *disk = container_of(deferred, struct initiator, publish);

	if (!disk->queue) {
		return;
	}
	(void)front_queue_publish(disk->queue); /* a kick that fails is that of a server that has gone */
	if (!disk->poller.link) {
		/* Asleep and armed. What its spin time is to follow is how long the device takes from here. */
		disk->poller.slept_at = reactor_now(disk->bdev.reactor);
	}
}

static bool must_flush(const struct initiator *disk, const struct bounce_slot *slot)
{
	const struct bdev_io *io = slot->io;

	return disk->setup.flush && io->op == BDEV_WRITE && (io->flags & BDEV_IO_FUA) &&
	       !(disk->flushing & 1ULL << slot->index);
}

static void ask_later(struct initiator *disk, struct bounce_slot *slot)
{
	struct reactor *reactor = disk->bdev.reactor;

	if (!disk->retry.place &&
	    timer_set(reactor, &disk->retry, reactor_now(reactor) + reactor_ns_to_ticks(LATER_NS))) {
		bounce_done(&disk->bounce, slot, -ENOMEM);
		return;
	}
	disk->later |= 1ULL << slot->index;
}

static void request_ended(struct initiator *disk, struct bounce_slot *slot)
{
	int status = disk->format->answer(disk, slot);

	if (unlikely(status == INITIATOR_LATER)) {
		ask_later(disk, slot);
	} else if (unlikely(status == INITIATOR_AGAIN)) {
		send(disk, slot);
	} else if (unlikely(status == 0 && must_flush(disk, slot))) {
		disk->flushing |= 1ULL << slot->index;
		send(disk, slot);
	} else {
		bounce_done(&disk->bounce, slot, status);
	}
}

static void retry(struct timer *timer)
{
	struct initiator *disk = container_of(timer, struct initiator, retry);
	uint64_t left = disk->later;

	disk->later = 0;
	for (; left; left &= left - 1) {
		send(disk, &disk->bounce.slots[__builtin_ctzll(left)]);
	}
}

/* The server has broken the rules: nothing that it says counts any more. */
static void give_up(struct initiator *disk)
{
	disk->broken = true;
	reactor_notify(disk->bdev.reactor, 0, NOTICE_LOG, -EPROTO,
		       "virtio initiator: the server answers what was not asked; its disk fails");
	timer_clear(disk->bdev.reactor, &disk->retry);
	disk->later = 0;
	for (uint32_t i = 0; i < disk->bounce.count; i++) {
		if (disk->bounce.slots[i].io) {
			bounce_done(&disk->bounce, &disk->bounce.slots[i], -EIO);
		}
	}
}

static int run(struct poller *poller)
{
	struct initiator *disk = container_of(poller, struct initiator, poller);
	struct front_used used[BATCH];
	uint8_t slots[BATCH];
	int count = disk->broken ? 0 : front_queue_reap(disk->queue, used, BATCH);

	if (unlikely(count < 0)) {
		give_up(disk);
		return 0;
	}
	/* All of these heads are free now, and the first end may be the start of another request. */
	for (int i = 0; i < count; i++) {
		slots[i] = disk->slot_of[used[i].head];
	}
	for (int i = 0; i < count; i++) {
		request_ended(disk, &disk->bounce.slots[slots[i]]);
	}
	return count;
}

static int sleep_until_called(struct poller *poller)
{
	struct initiator *disk = container_of(poller, struct initiator, poller);

	front_queue_want_call(disk->queue, true);
	if (!disk->broken && front_queue_ready(disk->queue)) {
		front_queue_want_call(disk->queue, false);
		return 1;
	}
	return 0;
}

static void wake(struct poller *poller)
{
	front_queue_want_call(container_of(poller, struct initiator, poller)->queue, false);
}

static void called(struct fd_watch *watch)
{
	poller_wake(&container_of(watch, struct initiator, call)->poller);
}

/* --- the connection ---------------------------------------------------------------------------------- */

static void disconnect(struct initiator *disk)
{
	if (!disk->queue) {
		return;
	}
	bounce_suspend(&disk->bounce);
	timer_clear(disk->bdev.reactor, &disk->retry);
	disk->later = 0;
	reactor_cancel(disk->bdev.reactor, &disk->publish);
	poller_stop(&disk->poller);
	fd_watch_stop(disk->bdev.reactor, &disk->call);
	front_queue_destroy(disk->queue);
	disk->queue = NULL;
	munmap(disk->area, disk->layout.size);
	close(disk->kick_fd);
	close(disk->call.fd);
	if (disk->bdev.removed) {
		bounce_fail_waiting(&disk->bounce, UINT64_MAX, -ENODEV);
	}
}

static int connect(struct initiator *disk, const struct initiator_link *link)
{
	const struct initiator_layout *layout = &disk->layout;
	int rc;

	disconnect(disk);
	disk->area =
	    mmap(NULL, layout->size, PROT_READ | PROT_WRITE, MAP_SHARED, link->memory_fd, (off_t)link->offset);
	if (disk->area == MAP_FAILED) {
		return -errno;
	}
	disk->queue =
	    front_queue_create(disk->area + layout->desc, disk->area + layout->avail, disk->area + layout->used,
			       disk->setup.queue_size, link->event_idx, false, link->kick_fd, link->call_fd);
	if (!disk->queue) {
		rc = -errno;
		goto no_queue;
	}
	disk->call = (struct fd_watch){.ready = called, .fd = link->call_fd};
	rc = fd_watch_start(disk->bdev.reactor, &disk->call);
	if (rc) {
		goto no_watch;
	}
	disk->kick_fd = link->kick_fd;
	disk->guest = link->guest;
	disk->broken = false;
	disk->poller = (struct poller){.run = run, .sleep = sleep_until_called, .wake = wake};
	poller_start(disk->bdev.reactor, &disk->poller);
	bounce_resume(&disk->bounce, disk->area + layout->data);
	return 0;
no_watch:
	front_queue_destroy(disk->queue);
	disk->queue = NULL;
no_queue:
	munmap(disk->area, layout->size);
	return rc;
}

static struct initiator *find(uint64_t key)
{
	struct initiator *disk = initiators;

	while (disk && disk->setup.key != key) {
		disk = disk->next;
	}
	return disk;
}

int initiator_connect(uint64_t key, const struct initiator_link *link)
{
	struct initiator *disk = find(key);

	return disk ? connect(disk, link) : -ENOENT;
}

void initiator_disconnect(uint64_t key)
{
	struct initiator *disk = find(key);

	if (disk) {
		disconnect(disk);
	}
}

/* --- the handle -------------------------------------------------------------------------------------- */

static void initiator_submit(struct bdev *bdev, struct bdev_io *io)
{
	if (io->op == BDEV_RESET) {
		bdev_complete_when_quiet(io);
	} else {
		bounce_submit(&((struct initiator *)bdev)->bounce, io);
	}
}

/* A queue has no way of taking back what the server has. */
static int initiator_abort(struct bdev *bdev, struct bdev_io *io)
{
	return bounce_abort(&((struct initiator *)bdev)->bounce, io);
}

static void initiator_remove(struct bdev *bdev)
{
	bounce_fail_waiting(&((struct initiator *)bdev)->bounce, UINT64_MAX, -ENODEV);
}

static void initiator_close(struct bdev *bdev)
{
	struct initiator *disk = (struct initiator *)bdev;
	struct initiator **link = &initiators;

	disconnect(disk);
	while (*link != disk) {
		link = &(*link)->next;
	}
	*link = disk->next;
	bounce_free(&disk->bounce);
	free(disk);
}

static const struct bdev_ops initiator_ops = {
    .submit = initiator_submit,
    .remove = initiator_remove,
    .abort = initiator_abort,
    .close = initiator_close,
};

struct bdev *initiator_bdev_open(struct reactor *reactor, uint64_t id, uint32_t slot,
				 const struct initiator_setup *setup, const struct initiator_link *link)
{
	struct bdev_limits limits = {
	    .bytes = {[BDEV_UNMAP] = setup->max_unmap, [BDEV_WRITE_ZEROES] = setup->max_zeroes}};
	struct initiator *disk;
	int rc;

	if (setup->queue_size > INITIATOR_QUEUE_MAX || slots_of(setup->queue_size) == 0) {
		errno = EINVAL;
		return NULL;
	}
	disk = calloc(1, sizeof(*disk));
	if (!disk) {
		return NULL;
	}
	bdev_init(&disk->bdev, &initiator_ops, reactor, id, slot, setup->block_size, setup->block_count,
		  setup->supported, setup->readonly);
	disk->setup = *setup;
	disk->format = setup->kind == INITIATOR_BLK ? &initiator_blk : &initiator_scsi;
	disk->layout = initiator_layout(setup->queue_size);
	disk->publish.run = publish;
	disk->retry.fire = retry;
	rc = bounce_init(&disk->bounce, NULL, slots_of(setup->queue_size), INITIATOR_PIECE,
			 !setup->write_zeroes, start);
	if (rc == 0) {
		rc = bounce_limit(&disk->bounce, &disk->bdev, limits);
	}
	if (rc == 0 && link) {
		rc = connect(disk, link);
	}
	if (rc) {
		divider_free(disk->bdev.divider);
		bounce_free(&disk->bounce);
		free(disk);
		errno = -rc;
		return NULL;
	}
	disk->next = initiators;
	initiators = disk;
	return &disk->bdev;
}
