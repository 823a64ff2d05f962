#include "reactor/reactor.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "reactor/ticks.h"

#define LOOK_NS 25000	  /* at most this long between looks at descriptors while there is work */
#define QUIET_NS 5000	  /* with no work for that long ... */
#define QUIET_LOOK_NS 500 /* ... nothing is lost by looking all the time */
#define EPOLL_BATCH 64	  /* descriptors dispatched by one look */
#define CALIBRATION_NS 4000000
#define LOG_NOTICES_MAX 256 /* further log lines are dropped until Python has read some */
#define NEVER UINT64_MAX

_Static_assert(sizeof(struct reactor_counters) <= REACTOR_SLOTS_OFFSET, "counters overlap slot 0");

struct notice_queue {
	struct reactor_notice *items;
	uint32_t first;
	uint32_t count;
	uint32_t room;
};

struct timer_heap {
	struct timer **items;
	uint32_t count;
	uint32_t room;
};

struct reactor {
	struct poller *hot;
	struct poller **hot_tail;
	struct poller *cursor; /* the poller to run next in this turn: poller_stop() keeps it valid */
	struct deferred *deferred;
	struct deferred **deferred_tail;
	uint64_t now;
	uint64_t looked_at;
	uint64_t worked_at; /* when a turn last found work */
	uint64_t look_ticks;
	uint64_t quiet_ticks;
	uint64_t quiet_look_ticks;
	uint64_t spin_max;
	enum reactor_mode mode;
	int epoll;
	struct reactor_counters *counters;
	struct timer_heap timers;
	struct notice_queue notices;
	struct reactor_event *events; /* where this reactor_poll() stores what is ready for Python */
	int events_room;
	int events_count;
	char *area;
	uint32_t slots;
	bool owns_area;
	_Alignas(64) char scratch[REACTOR_SLOT_SIZE];
};

/* --- time ------------------------------------------------------------------------------------------- */

static uint64_t tick_rate;

#if defined(__x86_64__)
struct moment {
	uint64_t ticks;
	uint64_t ns;
};

/* Both clocks at one moment: of a few readings the one that was interrupted least. */
static struct moment read_clocks(void)
{
	struct moment best = {0};
	uint64_t least = UINT64_MAX;

	for (int i = 0; i < 8; i++) {
		uint64_t before = ticks();
		uint64_t ns = ticks_ns();
		uint64_t gap = ticks() - before;

		if (gap < least) {
			least = gap;
			best = (struct moment){.ticks = before + gap / 2, .ns = ns};
		}
	}
	return best;
}
#endif

static void calibrate(void)
{
#if defined(__x86_64__)
	struct moment start = read_clocks();
	struct moment end;

	do {
		end = read_clocks();
	} while (end.ns - start.ns < CALIBRATION_NS);
	tick_rate = (uint64_t)((double)(end.ticks - start.ticks) * 1e9 / (double)(end.ns - start.ns));
#elif defined(__aarch64__)
	__asm__ volatile("mrs %0, cntfrq_el0" : "=r"(tick_rate));
#else
	tick_rate = 1000000000u;
#endif
}

uint64_t reactor_tick_rate(void)
{
	if (tick_rate == 0) {
		calibrate();
	}
	return tick_rate;
}

uint64_t reactor_ticks(void)
{
	return ticks();
}

uint64_t reactor_ns_to_ticks(uint64_t ns)
{
	return (uint64_t)((unsigned __int128)ns * reactor_tick_rate() / 1000000000u);
}

static uint64_t ticks_to_ns(uint64_t ticks)
{
	return (uint64_t)((unsigned __int128)ticks * 1000000000u / reactor_tick_rate());
}

uint64_t reactor_now(const struct reactor *reactor)
{
	return reactor->now;
}

/* --- life ------------------------------------------------------------------------------------------- */

static int use_area(struct reactor *reactor, void *area, uint32_t slots)
{
	reactor->area = area;
	reactor->slots = slots;
	if (area == NULL) {
		reactor->slots = 0;
		reactor->owns_area = true;
		reactor->area = calloc(1, REACTOR_SLOTS_OFFSET);
		if (reactor->area == NULL) {
			return -ENOMEM;
		}
	}
	reactor->counters = (struct reactor_counters *)reactor->area;
	reactor->counters->tick_rate = reactor_tick_rate();
	reactor->counters->pollers = reactor->counters->hot = reactor->counters->timers = 0;
	return 0;
}

struct reactor *reactor_create(enum reactor_mode mode, uint64_t spin_max_ns, void *area, uint32_t slots)
{
	struct reactor *reactor = aligned_alloc(64, (sizeof(*reactor) + 63) & ~(size_t)63);

	if (reactor == NULL) {
		errno = ENOMEM;
		return NULL;
	}
	memset(reactor, 0, sizeof(*reactor));
	reactor->epoll = -1;
	reactor->hot_tail = &reactor->hot;
	reactor->deferred_tail = &reactor->deferred;
	reactor->look_ticks = reactor_ns_to_ticks(LOOK_NS);
	reactor->quiet_ticks = reactor_ns_to_ticks(QUIET_NS);
	reactor->quiet_look_ticks = reactor_ns_to_ticks(QUIET_LOOK_NS);
	reactor->spin_max = reactor_ns_to_ticks(spin_max_ns);
	reactor->mode = mode;
	reactor->now = ticks();
	if (use_area(reactor, area, slots) < 0) {
		free(reactor);
		errno = ENOMEM;
		return NULL;
	}
	reactor->epoll = epoll_create1(EPOLL_CLOEXEC);
	if (reactor->epoll < 0) {
		reactor_destroy(reactor);
		return NULL;
	}
	return reactor;
}

void reactor_destroy(struct reactor *reactor)
{
	int saved = errno;

	if (reactor->epoll >= 0) {
		close(reactor->epoll);
	}
	if (reactor->owns_area) {
		free(reactor->area);
	}
	free(reactor->timers.items);
	free(reactor->notices.items);
	free(reactor);
	errno = saved;
}

void reactor_set_mode(struct reactor *reactor, enum reactor_mode mode)
{
	reactor->mode = mode;
}

const struct reactor_counters *reactor_counters(const struct reactor *reactor)
{
	return reactor->counters;
}

void reactor_count_ios(struct reactor *reactor, uint32_t n)
{
	reactor->counters->ios += n;
}

void *reactor_slot(struct reactor *reactor, uint32_t index)
{
	if (index >= reactor->slots) {
		return reactor->scratch;
	}
	return reactor->area + REACTOR_SLOTS_OFFSET + (size_t)index * REACTOR_SLOT_SIZE;
}

uint64_t reactor_annexes_offset(uint32_t slots)
{
	const uint64_t page = 4096;

	return (REACTOR_SLOTS_OFFSET + (uint64_t)slots * REACTOR_SLOT_SIZE + page - 1) & ~(page - 1);
}

void *reactor_annex(struct reactor *reactor, uint32_t index)
{
	static _Alignas(64) char scratch[REACTOR_ANNEX_SIZE]; /* written, and read by nobody */

	if (index >= reactor->slots) {
		return scratch;
	}
	return reactor->area + reactor_annexes_offset(reactor->slots) + (size_t)index * REACTOR_ANNEX_SIZE;
}

/* --- notices ---------------------------------------------------------------------------------------- */

static int notices_grow(struct notice_queue *queue)
{
	uint32_t room = queue->room ? queue->room * 2 : 16;
	struct reactor_notice *items = calloc(room, sizeof(*items));

	if (items == NULL) {
		return -ENOMEM;
	}
	for (uint32_t i = 0; i < queue->count; i++) {
		items[i] = queue->items[(queue->first + i) % queue->room];
	}
	free(queue->items);
	queue->items = items;
	queue->first = 0;
	queue->room = room;
	return 0;
}

void reactor_notify(struct reactor *reactor, uint64_t source, enum reactor_notice_kind kind, int code,
		    const char *format, ...)
{
	struct notice_queue *queue = &reactor->notices;
	struct reactor_notice *notice;
	va_list args;

	if (kind == NOTICE_LOG && queue->count >= LOG_NOTICES_MAX) {
		return;
	}
	if (queue->count == queue->room && notices_grow(queue) < 0) {
		return;
	}
	notice = &queue->items[(queue->first + queue->count++) % queue->room];
	notice->source = source;
	notice->kind = kind;
	notice->code = code;
	va_start(args, format);
	vsnprintf(notice->text, sizeof(notice->text), format, args);
	va_end(args);
}

int reactor_next_notice(struct reactor *reactor, struct reactor_notice *notice)
{
	struct notice_queue *queue = &reactor->notices;

	if (queue->count == 0) {
		return 0;
	}
	*notice = queue->items[queue->first];
	queue->first = (queue->first + 1) % queue->room;
	queue->count--;
	return 1;
}

/* --- pollers ---------------------------------------------------------------------------------------- */

static void make_hot(struct reactor *reactor, struct poller *poller)
{
	poller->next = NULL;
	poller->link = reactor->hot_tail;
	*reactor->hot_tail = poller;
	reactor->hot_tail = &poller->next;
	poller->idle_since = 0;
	reactor->counters->hot++;
}

static void make_cold(struct reactor *reactor, struct poller *poller)
{
	if (reactor->cursor == poller) {
		reactor->cursor = poller->next;
	}
	*poller->link = poller->next;
	if (poller->next != NULL) {
		poller->next->link = poller->link;
	} else {
		reactor->hot_tail = poller->link;
	}
	poller->link = NULL;
	reactor->counters->hot--;
}

void poller_start(struct reactor *reactor, struct poller *poller)
{
	poller->reactor = reactor;
	poller->spin = reactor->spin_max;
	reactor->counters->pollers++;
	make_hot(reactor, poller);
}

void poller_stop(struct poller *poller)
{
	if (poller->reactor == NULL) {
		return;
	}
	if (poller->link != NULL) {
		make_cold(poller->reactor, poller);
	}
	poller->reactor->counters->pollers--;
	poller->reactor = NULL;
}

/*
 * How long to spin before the next sleep follows the last one: a sleep that ended within the longest spin
 * would have been better spent spinning, a longer one means that spinning would have been in vain.
 */
static void adapt_spin(struct reactor *reactor, struct poller *poller)
{
	uint64_t max = reactor->spin_max;

	if (reactor->now - poller->slept_at <= max) {
		poller->spin = poller->spin == 0 ? max / 8 : poller->spin * 2;
		if (poller->spin > max) {
			poller->spin = max;
		}
	} else {
		poller->spin = poller->spin > max / 16 ? poller->spin / 2 : 0;
	}
}

void poller_wake(struct poller *poller)
{
	struct reactor *reactor = poller->reactor;

	if (reactor == NULL || poller->link != NULL) {
		return;
	}
	reactor->counters->wakeups++;
	adapt_spin(reactor, poller);
	if (poller->wake != NULL) {
		poller->wake(poller);
	}
	make_hot(reactor, poller);
}

void poller_expect(struct poller *poller, uint64_t ticks)
{
	struct reactor *reactor = poller->reactor;

	if (reactor == NULL || reactor->mode == REACTOR_NEVER) {
		return;
	}
	poller->expects_until = reactor->now + ticks;
	if (poller->link == NULL) {
		if (poller->wake != NULL) {
			poller->wake(poller);
		}
		make_hot(reactor, poller);
	}
}

/* A poller found nothing to do: send it to sleep when it has spun for long enough. */
static void rest(struct reactor *reactor, struct poller *poller)
{
	uint64_t spin = reactor->mode == REACTOR_NEVER ? 0 : poller->spin;

	if (poller->idle_since == 0) {
		poller->idle_since = reactor->now;
	}
	if (reactor->mode == REACTOR_ALWAYS || poller->sleep == NULL ||
	    reactor->now - poller->idle_since < spin || reactor->now < poller->expects_until) {
		return;
	}
	if (poller->sleep(poller) != 0) {
		poller->idle_since = 0;
	} else if (poller->link != NULL) {
		poller->slept_at = reactor->now;
		make_cold(reactor, poller);
	}
}

static uint32_t run_pollers(struct reactor *reactor)
{
	uint32_t work = 0;

	reactor->cursor = reactor->hot;
	while (reactor->cursor != NULL) {
		struct poller *poller = reactor->cursor;
		int done;

		reactor->cursor = poller->next;
		done = poller->run(poller);
		if (done > 0) {
			poller->idle_since = 0;
			work += (uint32_t)done;
		} else if (poller->link != NULL) {
			rest(reactor, poller);
		}
	}
	return work;
}

/* --- deferred work ---------------------------------------------------------------------------------- */

void reactor_defer(struct reactor *reactor, struct deferred *deferred)
{
	if (deferred->queued) {
		return;
	}
	deferred->queued = true;
	deferred->next = NULL;
	*reactor->deferred_tail = deferred;
	reactor->deferred_tail = &deferred->next;
}

void reactor_cancel(struct reactor *reactor, struct deferred *deferred)
{
	struct deferred **link = &reactor->deferred;

	if (!deferred->queued) {
		return;
	}
	while (*link != deferred) {
		link = &(*link)->next;
	}
	*link = deferred->next;
	if (deferred->next == NULL) {
		reactor->deferred_tail = link;
	}
	deferred->queued = false;
}

static void run_deferred(struct reactor *reactor)
{
	while (reactor->deferred != NULL) {
		struct deferred *deferred = reactor->deferred;

		reactor->deferred = deferred->next;
		if (reactor->deferred == NULL) {
			reactor->deferred_tail = &reactor->deferred;
		}
		deferred->queued = false;
		deferred->run(deferred);
	}
}

/* --- timers: a binary heap, the earliest first ------------------------------------------------------ */

static void heap_put(struct timer_heap *heap, uint32_t place, struct timer *timer)
{
	heap->items[place] = timer;
	timer->place = (int32_t)place + 1;
}

static void heap_settle(struct timer_heap *heap, uint32_t place, struct timer *timer)
{
	while (place > 0 && heap->items[(place - 1) / 2]->due > timer->due) {
		heap_put(heap, place, heap->items[(place - 1) / 2]);
		place = (place - 1) / 2;
	}
	for (uint32_t child = 2 * place + 1; child < heap->count; child = 2 * place + 1) {
		if (child + 1 < heap->count && heap->items[child + 1]->due < heap->items[child]->due) {
			child++;
		}
		if (heap->items[child]->due >= timer->due) {
			break;
		}
		heap_put(heap, place, heap->items[child]);
		place = child;
	}
	heap_put(heap, place, timer);
}

int timer_set(struct reactor *reactor, struct timer *timer, uint64_t due)
{
	struct timer_heap *heap = &reactor->timers;

	timer->due = due;
	if (timer->place != 0) {
		heap_settle(heap, (uint32_t)timer->place - 1, timer);
		return 0;
	}
	if (heap->count == heap->room) {
		uint32_t room = heap->room ? heap->room * 2 : 16;
		struct timer **items = realloc(heap->items, room * sizeof(*items));

		if (items == NULL) {
			return -ENOMEM;
		}
		heap->items = items;
		heap->room = room;
	}
	heap_settle(heap, heap->count++, timer);
	reactor->counters->timers = heap->count;
	return 0;
}

void timer_clear(struct reactor *reactor, struct timer *timer)
{
	struct timer_heap *heap = &reactor->timers;
	struct timer *last;

	if (timer->place == 0) {
		return;
	}
	last = heap->items[--heap->count];
	if (last != timer) {
		heap_settle(heap, (uint32_t)timer->place - 1, last);
	}
	timer->place = 0;
	reactor->counters->timers = heap->count;
}

static void run_timers(struct reactor *reactor)
{
	while (reactor->timers.count > 0 && reactor->timers.items[0]->due <= reactor->now) {
		struct timer *timer = reactor->timers.items[0];

		timer_clear(reactor, timer);
		timer->fire(timer);
	}
}

/* --- descriptors ------------------------------------------------------------------------------------ */

/* epoll data: the address of a struct fd_watch, or a descriptor watched for Python with the low bit set. */

static int control(struct reactor *reactor, int operation, int fd, uint32_t events, uint64_t data)
{
	struct epoll_event event = {.events = events, .data.u64 = data};

	return epoll_ctl(reactor->epoll, operation, fd, &event) < 0 ? -errno : 0;
}

static uint64_t python_data(int fd)
{
	return ((uint64_t)(uint32_t)fd << 1) | 1;
}

int reactor_watch(struct reactor *reactor, int fd, uint32_t events)
{
	return control(reactor, EPOLL_CTL_ADD, fd, events, python_data(fd));
}

int reactor_rewatch(struct reactor *reactor, int fd, uint32_t events)
{
	return control(reactor, EPOLL_CTL_MOD, fd, events, python_data(fd));
}

int reactor_unwatch(struct reactor *reactor, int fd)
{
	return control(reactor, EPOLL_CTL_DEL, fd, 0, 0);
}

int fd_watch_start(struct reactor *reactor, struct fd_watch *watch)
{
	return control(reactor, EPOLL_CTL_ADD, watch->fd, EPOLLIN | EPOLLET, (uint64_t)(uintptr_t)watch);
}

int fd_watch_stop(struct reactor *reactor, struct fd_watch *watch)
{
	int fd = watch->fd;

	if (fd >= 0) {
		control(reactor, EPOLL_CTL_DEL, fd, 0, 0);
		watch->fd = -1; /* an event of it that was fetched already is dropped */
	}
	return fd;
}

static void dispatch(struct reactor *reactor, const struct epoll_event *event)
{
	if (event->data.u64 & 1) {
		/* Level-triggered: what has no room now is reported by the next look. */
		if (reactor->events_count < reactor->events_room) {
			struct reactor_event *out = &reactor->events[reactor->events_count++];

			out->fd = (int)(event->data.u64 >> 1);
			out->events = event->events;
		}
	} else {
		struct fd_watch *watch = (struct fd_watch *)(uintptr_t)event->data.u64;

		if (watch->fd >= 0) {
			watch->ready(watch);
		}
	}
}

/* Wait up to @timeout ticks for descriptors and dispatch what is ready. Returns 0 or -errno. */
static int look(struct reactor *reactor, uint64_t timeout)
{
	struct epoll_event batch[EPOLL_BATCH];
	struct timespec limit;
	int n;

	if (timeout == 0) {
		n = epoll_wait(reactor->epoll, batch, EPOLL_BATCH, 0);
	} else {
		uint64_t ns = timeout == NEVER ? 0 : ticks_to_ns(timeout);

		limit.tv_sec = (time_t)(ns / 1000000000u);
		limit.tv_nsec = (long)(ns % 1000000000u);
		n = epoll_pwait2(reactor->epoll, batch, EPOLL_BATCH, timeout == NEVER ? NULL : &limit, NULL);
	}
	if (n < 0) {
		return -errno;
	}
	reactor->now = reactor->looked_at = ticks();
	for (int i = 0; i < n; i++) {
		dispatch(reactor, &batch[i]);
	}
	return 0;
}

/* Nothing is hot: sleep until a descriptor, a timer or the deadline. */
static int sleep_until(struct reactor *reactor, uint64_t deadline)
{
	uint64_t start = reactor->now;
	uint64_t until = deadline;
	int rc;

	if (reactor->timers.count > 0 && reactor->timers.items[0]->due < until) {
		until = reactor->timers.items[0]->due;
	}
	if (until <= start) {
		return look(reactor, 0);
	}
	reactor->counters->sleeps++;
	rc = look(reactor, until == NEVER ? NEVER : until - start);
	reactor->now = ticks();
	reactor->counters->sleep_ticks += reactor->now - start;
	return rc;
}

/* --- the loop --------------------------------------------------------------------------------------- */

static void turn(struct reactor *reactor)
{
	struct reactor_counters *counters = reactor->counters;
	uint64_t start = reactor->now;
	uint32_t work = run_pollers(reactor);

	run_deferred(reactor);
	reactor->now = ticks();
	counters->polls++;
	if (work > 0) {
		reactor->worked_at = reactor->now;
		counters->busy_ticks += reactor->now - start;
	} else {
		counters->idle_ticks += reactor->now - start;
	}
	if (reactor->timers.count > 0) {
		run_timers(reactor);
		run_deferred(reactor);
	}
}

/* Is it time to look at descriptors, although there are pollers to run? */
static bool must_look(const struct reactor *reactor)
{
	bool quiet = reactor->now - reactor->worked_at > reactor->quiet_ticks;

	return reactor->now - reactor->looked_at >= (quiet ? reactor->quiet_look_ticks : reactor->look_ticks);
}

int reactor_poll(struct reactor *reactor, int64_t timeout_ns, struct reactor_event *events, int max)
{
	uint64_t deadline;
	int rc = 0;

	reactor->events = events;
	reactor->events_room = max;
	reactor->events_count = 0;
	reactor->now = ticks();
	deadline = timeout_ns < 0 ? NEVER : reactor->now + reactor_ns_to_ticks((uint64_t)timeout_ns);

	for (;;) {
		bool due;

		turn(reactor);
		due = reactor->notices.count > 0 || reactor->now >= deadline;
		if (reactor->hot == NULL && reactor->mode != REACTOR_ALWAYS) {
			rc = sleep_until(reactor, due ? reactor->now : deadline);
		} else if (due || must_look(reactor)) {
			reactor->counters->looks++;
			rc = look(reactor, 0);
		}
		if (due || rc < 0 || reactor->events_count > 0) {
			break;
		}
	}
	/* Let Python run the handlers of the signal that interrupted us. */
	return rc < 0 && rc != -EINTR ? rc : reactor->events_count;
}
