/*
 * A request goes to the base at once, and its end is held back. There is a line for each latency: within one
 * all wait equally long, so the first is always the next to go, and one timer for the earliest of the first is
 * enough. When a latency is lowered, those that wait already still go first.
 */
#include "bdev/delay.h"

#include <errno.h>

#include "bdev/detour.h"
#include "bdev/stacked.h"

enum { AVG_READ, P99_READ, AVG_WRITE, P99_WRITE, LINES };

struct line {
	uint64_t ticks; /* of delay */
	struct bdev_io *first, **end;
};

struct delay_bdev {
	struct stacked stacked;
	struct line line[LINES];
	struct timer timer;
	uint32_t chance; /* state of the generator */
};

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

/* While the end of a request is held back: */
static uint64_t *due_of(struct bdev_io *io)
{
	_Static_assert(sizeof(io->scratch[0]) == sizeof(uint64_t), "a time fits in a pointer's place");
	return (uint64_t *)&io->scratch[0];
}

static int *status_of(struct bdev_io *io)
{
	return (int *)&io->scratch[1];
}

static uint32_t next_chance(struct delay_bdev *disk)
{
	uint32_t x = disk->chance; /* Marsaglia's xorshift32 */

	x ^= x << 13;
	x ^= x >> 17;
	x ^= x << 5;
	return disk->chance = x;
}

static struct line *choose(struct delay_bdev *disk, const struct bdev_io *io)
{
	unsigned line = io->op == BDEV_READ ? AVG_READ : AVG_WRITE;

	return &disk->line[line + (next_chance(disk) % 100 == 0)];
}

static struct bdev_io *take_first(struct line *line)
{
	struct bdev_io *io = line->first;

	line->first = io->next;
	if (!line->first) {
		line->end = &line->first;
	}
	return io;
}

static int set_timer(struct delay_bdev *disk)
{
	uint64_t due = UINT64_MAX;

	for (unsigned i = 0; i < LINES; i++) {
		if (disk->line[i].first && *due_of(disk->line[i].first) < due) {
			due = *due_of(disk->line[i].first);
		}
	}
	return due == UINT64_MAX ? 0 : timer_set(disk->stacked.bdev.reactor, &disk->timer, due);
}

/* End all whose time has come; with @all, those whose time has not. */
static void end_due(struct delay_bdev *disk, uint64_t now, bool all)
{
	for (unsigned i = 0; i < LINES; i++) {
		struct line *line = &disk->line[i];

		while (line->first && (all || *due_of(line->first) <= now)) {
			struct bdev_io *io = take_first(line);

			bdev_complete(io, *status_of(io));
		}
	}
}

static void delay_ended(struct bdev *bdev, struct bdev_io *io, int status)
{
	struct delay_bdev *disk = (struct delay_bdev *)bdev;
	struct line *line = choose(disk, io);
	bool first = !line->first;

	if (!line->ticks || bdev->removed) {
		bdev_complete(io, status);
		return;
	}
	*due_of(io) = reactor_ticks() + line->ticks; /* not the time of this turn, which may be long */
	*status_of(io) = status;
	io->next = NULL;
	*line->end = io;
	line->end = &io->next;
	if (first && set_timer(disk)) {
		/* No memory for a timer: too soon is better than never. */
		bdev_complete(take_first(line), status);
	}
}

static void fire(struct timer *timer)
{
	struct delay_bdev *disk = container_of(timer, struct delay_bdev, timer);

	end_due(disk, reactor_now(disk->stacked.bdev.reactor), false);
	set_timer(disk); /* has memory: the timer was set a moment ago */
}

static void delay_submit(struct bdev *bdev, struct bdev_io *io)
{
	struct stacked *stacked = (struct stacked *)bdev;

	if (io->op == BDEV_RESET) {
		bdev_complete_when_quiet(io);
		return;
	}
	stacked_forward(stacked, io, stacked->base, io->offset);
}

/* One that is held back was carried out; then there is nothing to abort, but nothing to wait for either. */
static int delay_abort(struct bdev *bdev, struct bdev_io *io)
{
	struct delay_bdev *disk = (struct delay_bdev *)bdev;

	for (unsigned i = 0; i < LINES; i++) {
		if (detour_unlink(&disk->line[i].first, &disk->line[i].end, io)) {
			bdev_complete(io, *status_of(io));
			return 0;
		}
	}
	return stacked_abort(bdev, io);
}

static void delay_remove(struct bdev *bdev)
{
	struct delay_bdev *disk = (struct delay_bdev *)bdev;

	timer_clear(bdev->reactor, &disk->timer);
	end_due(disk, 0, true); /* they were carried out: that is not undone */
}

static void delay_close(struct bdev *bdev)
{
	timer_clear(bdev->reactor, &((struct delay_bdev *)bdev)->timer);
	stacked_close(bdev);
}

static const struct bdev_ops delay_ops = {
    .submit = delay_submit,
    .remove = delay_remove,
    .abort = delay_abort,
    .extent = stacked_extent,
    .close = delay_close,
};

void delay_bdev_set_latency(struct bdev *bdev, const struct delay_latency *latency)
{
	struct delay_bdev *disk = (struct delay_bdev *)bdev;

	disk->line[AVG_READ].ticks = reactor_ns_to_ticks(latency->avg_read);
	disk->line[P99_READ].ticks = reactor_ns_to_ticks(latency->p99_read);
	disk->line[AVG_WRITE].ticks = reactor_ns_to_ticks(latency->avg_write);
	disk->line[P99_WRITE].ticks = reactor_ns_to_ticks(latency->p99_write);
}

struct bdev *delay_bdev_open(uint64_t id, uint32_t slot, uint64_t block_count, struct bdev *base,
			     const struct delay_latency *latency, uint32_t seed)
{
	struct delay_bdev *disk = stacked_over(sizeof(*disk), base, &delay_ops, id, slot, block_count);

	if (!disk) {
		return NULL;
	}
	disk->stacked.children.ended = delay_ended;
	disk->stacked.bdev.memory = base->memory; /* for bdev_prefetch() */
	disk->stacked.bdev.sparse = base->sparse;
	disk->timer.fire = fire;
	disk->chance = seed | 1;
	for (unsigned i = 0; i < LINES; i++) {
		disk->line[i].end = &disk->line[i].first;
	}
	delay_bdev_set_latency(&disk->stacked.bdev, latency);
	return &disk->stacked.bdev;
}
