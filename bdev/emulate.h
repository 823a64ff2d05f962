/*
 * Operations that a device does not have, made of those that it has: COMPARE and VERIFY of reads, COPY of reads
 * and writes, WRITE_ZEROES of writes, COMPARE_AND_WRITE of a read and a write under a lock of their range.
 * UNMAP is not made of anything: a device that cannot give space back says so.
 */
#ifndef BDEV_EMULATE_H
#define BDEV_EMULATE_H

#include "bdev/bdev.h"

/* Carry out @io, for bdev/detour.c: one bdev_complete() follows. */
void emulate(struct bdev_io *io);
/* bdev_abort() of one of these. */
int emulate_abort(struct bdev_emulator *emulator, struct bdev_io *io);
/* With the handle. May be NULL. */
void emulator_free(struct bdev_emulator *emulator);

#endif
