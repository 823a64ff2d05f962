/*
 * A memory barrier on every processor that runs a process of ours: where one side of a protocol between
 * processes is rare and the other frequent, the rare one pays for both, and the frequent one has none.
 */
#ifndef REACTOR_BARRIER_H
#define REACTOR_BARRIER_H

/* Once in each process that barrier_everywhere() is to reach. */
void barrier_register(void);
/*
 * What others stored before is seen from here, and they see what we have stored. Where the kernel has no
 * membarrier(2) it does nothing: let some time pass before you look, no store waits that long in practice.
 */
void barrier_everywhere(void);

#endif
