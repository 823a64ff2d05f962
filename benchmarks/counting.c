#include "benchmarks/counting.h"

#include <stddef.h>
#include <valgrind/callgrind.h>

struct event {
	uint64_t space[4]; /* as much as one struct reactor_event at least */
};

typedef int (*poll_function)(void *reactor, int64_t timeout_ns, struct event *events, int max);
typedef uint64_t (*measure_function)(void *bdev, const void *setup, int *error);

int counted_poll(void *reactor_poll, void *reactor, uint32_t turns)
{
	poll_function poll = (poll_function)reactor_poll;
	struct event event;
	int rc = 0;

	CALLGRIND_TOGGLE_COLLECT;
	while (turns-- && rc >= 0) {
		rc = poll(reactor, 0, &event, 1);
	}
	CALLGRIND_TOGGLE_COLLECT;
	return rc < 0 ? rc : 0;
}

int counted_measure(void *bdev_measure, void *bdev, const void *setup)
{
	measure_function measure = (measure_function)bdev_measure;
	int error;

	CALLGRIND_TOGGLE_COLLECT;
	measure(bdev, setup, &error);
	CALLGRIND_TOGGLE_COLLECT;
	return error;
}

void counting_start(void)
{
	CALLGRIND_START_INSTRUMENTATION;
	CALLGRIND_ZERO_STATS;
}

void counting_dump(const char *name)
{
	CALLGRIND_DUMP_STATS_AT(name);
}
