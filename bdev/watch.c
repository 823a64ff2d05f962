#include "bdev/watch.h"

#include <errno.h>
#include <stdlib.h>

#include "bdev/detour.h"

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

struct bdev_watch {
	struct bdev *bdev;
	struct bdev_io *oldest, *newest;
	struct bdev_io *next_due; /* the oldest that has not timed out */
	uint64_t slow, timeout;	  /* ticks; 0: no limit */
	bool abort;
	struct timer timer;
	uint64_t ended_count;
	struct bdev_slow_request ended[BDEV_SLOW_KEPT];
};

const char *bdev_stage_name(uint32_t stage)
{
	static const char *const names[] = {"device", "limits", "range", "parts", "divided"};

	return stage < BDEV_STAGES ? names[stage] : "unknown";
}

/* --- timeouts -------------------------------------------------------------------------------------------- */

static int set_timer(struct bdev_watch *watch)
{
	if (!watch->timeout || !watch->next_due || watch->timer.place) {
		return 0;
	}
	return timer_set(watch->bdev->reactor, &watch->timer, watch->next_due->submitted + watch->timeout);
}

static void report(struct bdev_watch *watch, const struct bdev_io *io)
{
	static const char *const ops[] = {
	    "READ", "WRITE",  "FLUSH", "UNMAP", "WRITE_ZEROES", "RESET", "COMPARE", "COMPARE_AND_WRITE",
	    "COPY", "VERIFY",
	};

	_Static_assert(sizeof(ops) / sizeof(ops[0]) == BDEV_ALL_OPS, "a name an operation");
	uint64_t age = reactor_ticks() - io->submitted;

	reactor_notify(watch->bdev->reactor, watch->bdev->id, NOTICE_LOG, -ETIMEDOUT,
		       "%s of %llu bytes at %llu: not completed after %llu ms (%s)", ops[io->op],
		       (unsigned long long)io->length, (unsigned long long)io->offset,
		       (unsigned long long)(age / (reactor_tick_rate() / 1000)), bdev_stage_name(io->stage));
}

static void fire(struct timer *timer)
{
	struct bdev_watch *watch = container_of(timer, struct bdev_watch, timer);
	uint64_t now = reactor_ticks();

	while (watch->next_due && watch->next_due->submitted + watch->timeout <= now) {
		struct bdev_io *io = watch->next_due;

		watch->next_due = io->newer;
		io->epoch |= BDEV_MARK_TIMED_OUT;
		report(watch, io);
		if (watch->abort) {
			(void)bdev_abort(io); /* what cannot be aborted goes on, and was reported */
		}
	}
	(void)set_timer(watch); /* has memory: it was set a moment ago */
}

/* --- the list -------------------------------------------------------------------------------------------- */

void watch_begin(struct bdev_watch *watch, struct bdev_io *io)
{
	io->epoch |= BDEV_MARK_WATCHED;
	io->older = watch->newest;
	io->newer = NULL;
	*(watch->newest ? &watch->newest->newer : &watch->oldest) = io;
	watch->newest = io;
	if (!watch->next_due) {
		watch->next_due = io;
		(void)set_timer(watch); /* without memory it is seen with the next one */
	}
}

static void describe(const struct bdev_io *io, uint64_t now, struct bdev_slow_request *out)
{
	*out = (struct bdev_slow_request){
	    .offset = io->offset,
	    .length = io->length,
	    .age = now - io->submitted,
	    .op = io->op,
	    .stage = io->stage,
	    .timed_out = io->epoch & BDEV_MARK_TIMED_OUT,
	};
}

void watch_end(struct bdev_watch *watch, struct bdev_io *io, int status)
{
	uint64_t now = reactor_now(watch->bdev->reactor);

	*(io->older ? &io->older->newer : &watch->oldest) = io->newer;
	*(io->newer ? &io->newer->older : &watch->newest) = io->older;
	if (watch->next_due == io) {
		watch->next_due = io->newer; /* the timer may fire too early, and is then set again */
	}
	if (watch->slow && now > io->submitted && now - io->submitted >= watch->slow) {
		struct bdev_slow_request *kept = &watch->ended[watch->ended_count++ % BDEV_SLOW_KEPT];

		describe(io, now, kept);
		kept->ended = now;
		kept->status = status;
	}
}

uint32_t bdev_slow_requests(struct bdev *bdev, struct bdev_slow_request *out, uint32_t max)
{
	struct bdev_watch *watch = bdev->watch;
	uint64_t now = reactor_ticks();
	uint32_t count = 0;

	if (!watch || !watch->slow) {
		return 0;
	}
	for (const struct bdev_io *io = watch->oldest; io && count < max; io = io->newer) {
		if (now - io->submitted < watch->slow) {
			break; /* those behind it are younger */
		}
		describe(io, now, &out[count++]);
	}
	for (uint64_t i = watch->ended_count; i && watch->ended_count - i < BDEV_SLOW_KEPT && count < max;
	     i--) {
		out[count++] = watch->ended[(i - 1) % BDEV_SLOW_KEPT];
	}
	return count;
}

/* --- life ------------------------------------------------------------------------------------------------ */

/* Those in flight are watched no more. */
static void forget_all(struct bdev_watch *watch)
{
	for (struct bdev_io *io = watch->oldest; io; io = io->newer) {
		io->epoch &= (uint8_t)~BDEV_MARK_WATCHED;
	}
}

void watch_free(struct bdev_watch *watch)
{
	if (watch) {
		timer_clear(watch->bdev->reactor, &watch->timer);
		forget_all(watch);
		free(watch);
	}
}

int bdev_set_watch(struct bdev *bdev, const struct bdev_watch_setup *setup)
{
	struct bdev_watch *watch = bdev->watch;

	if (!setup->slow_ns && !setup->timeout_ns) {
		watch_free(watch);
		bdev->watch = NULL;
		detour_update(bdev);
		return 0;
	}
	if (!watch) {
		watch = calloc(1, sizeof(*watch));
		if (!watch) {
			return -ENOMEM;
		}
		watch->bdev = bdev;
		watch->timer.fire = fire;
		bdev->watch = watch;
		detour_update(bdev);
	}
	watch->slow = reactor_ns_to_ticks(setup->slow_ns);
	watch->timeout = reactor_ns_to_ticks(setup->timeout_ns);
	watch->abort = setup->abort;
	timer_clear(bdev->reactor, &watch->timer);
	return set_timer(watch);
}
