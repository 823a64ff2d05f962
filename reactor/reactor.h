/*
 * The poll loop of one reactor process.
 *
 * A reactor owns one thread. Each turn of reactor_poll() runs the pollers of the hot list, then work that
 * was deferred to the end of the turn, then timers that are due; every so often it looks at file
 * descriptors. A poller that has found nothing to do for its spin time is put to sleep: its owner arms a
 * notification (a kick eventfd, an io_uring's descriptor) that stands in the same epoll set, and the poller
 * costs nothing until it is woken. With no hot poller the reactor itself sleeps in epoll_wait().
 *
 * Nothing here is thread-safe: a reactor is used by the thread that polls it, between or inside turns.
 */
#ifndef REACTOR_REACTOR_H
#define REACTOR_REACTOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
/* When does a poller with nothing to do go to sleep? */
enum reactor_mode {
	REACTOR_ADAPTIVE, /* after a spin time that follows how long its past sleeps lasted */
	REACTOR_ALWAYS,	  /* never: always poll */
	REACTOR_NEVER,	  /* at once: never spin */
};

/*
 * The shared statistics area: struct reactor_counters, then slots, then an annex for each slot, which takes
 * memory only once it is written.
 */
#define REACTOR_SLOT_SIZE 512	  /* bytes */
#define REACTOR_SLOTS_OFFSET 4096 /* where slot 0 begins */
#define REACTOR_ANNEX_SIZE 24576  /* bytes, whole pages */

/* At the start of the shared statistics area; written by the reactor alone, read by anyone. */
struct reactor_counters {
	uint64_t tick_rate;   /* ticks a second */
	uint64_t polls;	      /* turns */
	uint64_t busy_ticks;  /* in turns that found work */
	uint64_t idle_ticks;  /* in turns that found none, spinning */
	uint64_t sleep_ticks; /* in epoll_wait, asleep */
	uint64_t sleeps;      /* times that the reactor went to sleep */
	uint64_t wakeups;     /* pollers woken by their descriptor */
	uint64_t looks;	      /* looks at descriptors without sleeping */
	uint64_t ios;	      /* requests completed by queues */
	uint64_t pollers;     /* there are now */
	uint64_t hot;	      /* of these, in the hot list */
	uint64_t timers;      /* set now */
};

/* A descriptor watched for Python became ready; events are EPOLLIN | EPOLLOUT | ... */
struct reactor_event {
	int fd;
	uint32_t events;
};

#define REACTOR_NOTICE_TEXT 160

/* Something that C tells Python about one of its objects. */
struct reactor_notice {
	uint64_t source; /* the id that the object was made with */
	int32_t code;	 /* 0, or -errno of a failure */
	uint32_t kind;	 /* enum reactor_notice_kind */
	char text[REACTOR_NOTICE_TEXT];
};

enum reactor_notice_kind {
	NOTICE_BROKEN,	/* a guest broke the rules: the queue has stopped, text says what and where */
	NOTICE_DRAINED, /* a stopping queue or a closing device has no more requests in flight */
	NOTICE_LOG,	/* text is worth a line in the log */
	NOTICE_ASK,	/* a request needs what C cannot do; code is its slot */
	NOTICE_WAITING, /* a queue needs to be told something before it can go on */
};

struct reactor;

/* @area: the shared statistics area (@slots slots), or NULL for a private one. NULL and errno on failure. */
struct reactor *reactor_create(enum reactor_mode mode, uint64_t spin_max_ns, void *area, uint32_t slots);
void reactor_destroy(struct reactor *reactor);

/* Watch a descriptor for Python; -EEXIST, -ENOENT, -EPERM ... as epoll_ctl. */
int reactor_watch(struct reactor *reactor, int fd, uint32_t events);
int reactor_rewatch(struct reactor *reactor, int fd, uint32_t events);
int reactor_unwatch(struct reactor *reactor, int fd);

/*
 * Run turns until a watched descriptor is ready, a notice waits, or @timeout_ns has passed (negative: no
 * limit; 0: one turn). Returns the number of events stored, 0 to @max, or -errno.
 */
int reactor_poll(struct reactor *reactor, int64_t timeout_ns, struct reactor_event *events, int max);

/* Take the oldest notice: 1, or 0 when there is none. */
int reactor_next_notice(struct reactor *reactor, struct reactor_notice *notice);

const struct reactor_counters *reactor_counters(const struct reactor *reactor);
void reactor_set_mode(struct reactor *reactor, enum reactor_mode mode);
/* Where the annexes of an area with so many slots begin: a multiple of a page. */
uint64_t reactor_annexes_offset(uint32_t slots);
uint64_t reactor_ticks(void);
uint64_t reactor_tick_rate(void);
/* cffi: end */

/*
 * A poller lives inside the object it serves. All of its functions are called by the reactor's thread.
 */
struct poller {
	/* Do a bounded amount of work; returns how much was done, 0 for none. */
	int (*run)(struct poller *poller);
	/*
	 * Arm the notification that will wake this poller, then look once more: returns non-zero if there
	 * is work after all (the poller then stays hot and must have disarmed again). NULL: never sleeps.
	 */
	int (*sleep)(struct poller *poller);
	/* The poller is about to be hot again: disarm. May be NULL. */
	void (*wake)(struct poller *poller);

	struct reactor *reactor;
	struct poller *next;	/* hot list */
	struct poller **link;	/* what points at us; NULL when not hot */
	uint64_t idle_since;	/* ticks; 0 when the last turn found work */
	uint64_t slept_at;	/* ticks */
	uint64_t spin;		/* ticks to spin before sleeping, adapted */
	uint64_t expects_until; /* ticks: stay hot at least so long */
};

void poller_start(struct reactor *reactor, struct poller *poller); /* hot at once */
void poller_stop(struct poller *poller);			   /* hot or asleep; a no-op when stopped */
void poller_wake(struct poller *poller);			   /* a no-op when hot */
/*
 * Something will come soon: be hot for @ticks at least, whatever past sleeps say. Not with REACTOR_NEVER.
 */
void poller_expect(struct poller *poller, uint64_t ticks);

/* A descriptor watched by C: @ready is called, edge-triggered, when it becomes readable. */
struct fd_watch {
	void (*ready)(struct fd_watch *watch);
	int fd;
};

int fd_watch_start(struct reactor *reactor, struct fd_watch *watch);
/* Return the descriptor, which is the caller's to close; -1 if the watch has been stopped before. */
int fd_watch_stop(struct reactor *reactor, struct fd_watch *watch);

/* Work put off to the end of the current turn, once however often it is asked for. */
struct deferred {
	void (*run)(struct deferred *deferred);
	struct deferred *next;
	bool queued;
};

void reactor_defer(struct reactor *reactor, struct deferred *deferred);
void reactor_cancel(struct reactor *reactor, struct deferred *deferred);

/* A one-shot timer; its place in the heap is kept in the timer. */
struct timer {
	void (*fire)(struct timer *timer);
	uint64_t due;  /* ticks */
	int32_t place; /* index in the heap plus 1; 0 when not set */
};

int timer_set(struct reactor *reactor, struct timer *timer, uint64_t due); /* -ENOMEM */
void timer_clear(struct reactor *reactor, struct timer *timer);

/* Tell Python; when the ring of notices is full the oldest log line is lost, never a DRAINED or BROKEN. */
void reactor_notify(struct reactor *reactor, uint64_t source, enum reactor_notice_kind kind, int code,
		    const char *format, ...) __attribute__((format(printf, 5, 6)));

/* The time of the current turn, in ticks: free to read, at most a turn old. */
uint64_t reactor_now(const struct reactor *reactor);
void reactor_count_ios(struct reactor *reactor, uint32_t n);
uint64_t reactor_ns_to_ticks(uint64_t ns);

/* A slot of the shared statistics area; a private scratch slot when @index is past the end. */
void *reactor_slot(struct reactor *reactor, uint32_t index);
/* The annex of a slot; a scratch one when @index is past the end. */
void *reactor_annex(struct reactor *reactor, uint32_t index);

#endif
