/* Parts of a program that valgrind's callgrind counts, and nothing else of it. */
#ifndef BENCHMARKS_COUNTING_H
#define BENCHMARKS_COUNTING_H

#include <stdint.h>

/* cffi: begin */
/* Run @turns of the poll loop by its function's address, counting each instruction. 0 or -errno. */
int counted_poll(void *reactor_poll, void *reactor, uint32_t turns);
/* bdev_measure() (bdev/measure.h), by its address, counting each instruction. 0 or -errno. */
int counted_measure(void *bdev_measure, void *bdev, const void *setup);
/* Begin to count from 0. */
void counting_start(void);
/* Write what was counted, as @name, to callgrind's output. */
void counting_dump(const char *name);
/* cffi: end */

#endif
