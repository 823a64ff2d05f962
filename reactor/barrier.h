/*
 * A memory barrier on every processor that runs a process of ours: where one side of a protocol between
 * processes is rare and the other frequent, the rare one pays for both.
 *
 * Each side stores A and then loads B, the other stores B and then loads A, and at least one of them must see
 * what the other has stored. That takes a full barrier between the two steps of both: x86 lets a load pass an
 * older store to another address, and other processors let more. The frequent side has barrier_here() there,
 * the rare one barrier_everywhere(), whose interrupt is a full barrier at some point of every registered thread
 * that runs (who does not run passes one in the scheduler before it does). Where that point is after the
 * frequent side's store, the rare side sees this; else it is before its load too, which sees what the rare side
 * has stored. So the compiler's order is all that the frequent side needs, on any processor.
 */
#ifndef REACTOR_BARRIER_H
#define REACTOR_BARRIER_H

#include <stdbool.h>

/* cffi: begin */
/* The kernel has no membarrier(2), or does not let us have it: then every side makes its own barriers. */
extern bool barrier_is_dear;
/* cffi: end */

/* In each process that has barrier_here(), before that. */
void barrier_register(void);
/* What others stored before their barrier_here() is seen from now on, or they see what we have stored. */
void barrier_everywhere(void);

static inline __attribute__((always_inline)) void barrier_here(void)
{
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
	if (__builtin_expect(barrier_is_dear, 0)) {
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
	}
}

#endif
