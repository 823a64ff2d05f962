/* The processor's constant-rate counter: cheap enough to read once a turn. */
#ifndef REACTOR_TICKS_H
#define REACTOR_TICKS_H

#include <stdint.h>
#include <time.h>

static inline uint64_t ticks_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static inline uint64_t ticks(void)
{
#if defined(__x86_64__)
	return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
	uint64_t value;

	__asm__ volatile("mrs %0, cntvct_el0" : "=r"(value));
	return value;
#else
	return ticks_ns();
#endif
}

#endif
