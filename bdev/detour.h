/*
 * The way of a request that does not go straight to its device: past the limits, past ranges that somebody has
 * locked, and then to the device, or in parts where the device does not know the operation, or not so much of
 * it at once.
 */
#ifndef BDEV_DETOUR_H
#define BDEV_DETOUR_H

#include "bdev/bdev.h"

/* These have no range; they are few, so that what goes straight to the device need not look for them. */
#define BDEV_HAVE_NO_RANGE (1U << BDEV_FLUSH | 1U << BDEV_RESET)

/* Where such a request is. */
enum bdev_stage {
	BDEV_STAGE_DEVICE,
	BDEV_STAGE_LIMITS,  /* waits until its limits let it go */
	BDEV_STAGE_RANGE,   /* waits for a range that somebody else has locked */
	BDEV_STAGE_PARTS,   /* is carried out in parts, as the device has not the operation */
	BDEV_STAGE_DIVIDED, /* the same, as it exceeds the device's limits */
	BDEV_STAGES,
};

/* In io->epoch, beside the epoch: what there is to do when the request ends. Any of them makes it special. */
enum bdev_mark {
	BDEV_MARK_PART = 0x02,	  /* a part of another request: neither counted nor waited for */
	BDEV_MARK_WRITER = 0x04,  /* counted among those that change data: bdev/ranges.c */
	BDEV_MARK_ODD = 0x08,	  /* ... by the odd one of its two counters */
	BDEV_MARK_COUNTED = 0x10, /* began when there were such counters; also in bdev->epoch */
	BDEV_MARK_WATCHED = 0x20, /* stands in the list of bdev/watch.c */
	BDEV_MARK_TIMED_OUT = 0x40,
	BDEV_MARK_REMOVED = 0x80, /* only in bdev->epoch: makes all that are in flight special */
};

/* Begin. */
void detour_start(struct bdev_io *io);
/* The limits let it go; the range is free. */
void detour_past_limits(struct bdev_io *io);
void detour_past_ranges(struct bdev_io *io);
/* A request, or something that the handle has for requests to pass, is no more. */
void detour_end(struct bdev_io *io, int status);
/* What may go straight has changed. */
void detour_update(struct bdev *bdev);

/* Take @io out of a line that ends at *@end; false if it is not in it. */
bool detour_unlink(struct bdev_io **first, struct bdev_io ***end, struct bdev_io *io);

/* Have the device carry out a part of a request that was checked: io->done follows, and nothing is counted. */
void detour_submit_part(struct bdev_io *part);

#endif
