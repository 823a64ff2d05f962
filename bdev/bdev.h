/*
 * The interface that every block device implements.
 *
 * A struct bdev is one process's handle on a device: the process is a reactor with one thread, so a handle
 * needs no lock, and there is no separate channel object. What a device consists of (a memfd, a file's
 * descriptor, a queue pair) belongs to the control process, which lends it to every reactor that serves it.
 */
#ifndef BDEV_BDEV_H
#define BDEV_BDEV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "reactor/reactor.h"

/* cffi: begin */
enum bdev_op {
	BDEV_READ,
	BDEV_WRITE,
	BDEV_FLUSH,	   /* everything completed before is durable when this completes */
	BDEV_UNMAP,	   /* the range's contents are no longer needed; it may read as anything after */
	BDEV_WRITE_ZEROES, /* the range reads as zeroes after */
	BDEV_RESET,	   /* everything submitted before has completed when this completes */
	BDEV_OPS,	   /* those of a device; the following ones are made of them where it has them not */
	BDEV_COMPARE = BDEV_OPS, /* -EILSEQ where the range is not as the data, see io->miscompare */
	BDEV_COMPARE_AND_WRITE,	 /* as one; data: what to compare with, and after it what to write */
	BDEV_COPY,		 /* from io->source; the ranges may overlap */
	BDEV_VERIFY,		 /* the range can be read: no data move */
	BDEV_ALL_OPS,
};

#define BDEV_IO_FUA 0x1	   /* write: durable when it completes */
#define BDEV_IO_UNMAP 0x2  /* write zeroes: may deallocate */
#define BDEV_IO_AGAIN 0x4  /* compare and write: may have been carried out, by a process that has died */
#define BDEV_IO_LOCKED 0x8 /* the caller holds the range: bdev/ranges.h */

#define BDEV_DEVICE_OPS 0x3f	 /* 1 << those before BDEV_OPS */
#define BDEV_ATOMIC_BYTES 131072 /* the longest COMPARE_AND_WRITE */

/* What one process has done to one device: a slot of the shared statistics area. */
struct bdev_stats {
	uint64_t ops[10];	/* completed, by enum bdev_op */
	uint64_t bytes[10];	/* moved by those that succeeded */
	uint64_t ticks[10];	/* latency, summed */
	uint64_t min_ticks[10]; /* 0 while there is none */
	uint64_t max_ticks[10];
	uint64_t errors;
	uint64_t in_flight;
};

/*
 * How long it took: in the annex of the slot. Buckets are log-linear, 8 to each power of two, so that a value
 * is known to an eighth: those of range 0 and 1 have one value each (0 to 15 ticks), those of range r have
 * 2^(r-1). The last one has all that is longer than 2^40 ticks, some minutes.
 */
#define BDEV_HISTOGRAM_BITS 3
#define BDEV_HISTOGRAM_RANGES 38
#define BDEV_HISTOGRAM_BUCKETS 304

struct bdev_histograms {
	uint64_t bucket[10][304]; /* by enum bdev_op */
};

struct bdev;

uint64_t bdev_in_flight(const struct bdev *bdev);
uint64_t bdev_size(const struct bdev *bdev);
uint32_t bdev_block_size(const struct bdev *bdev);
/* Which operations it has: 1 << enum bdev_op. */
uint32_t bdev_supported(const struct bdev *bdev);
bool bdev_readonly(const struct bdev *bdev);
/* From now on new requests fail with -ENODEV; one NOTICE_DRAINED follows when none is in flight. */
void bdev_remove(struct bdev *bdev);
/* In which bucket of a histogram a latency is counted. */
uint32_t bdev_histogram_bucket(uint64_t ticks);
/* The device has another size now (a file that grew): 0, or -errno and the old size stays. */
int bdev_set_blocks(struct bdev *bdev, uint64_t block_count);
/* Free the handle: 0, or -EBUSY (and nothing happens) while something is in flight or it is held. */
int bdev_close(struct bdev *bdev);
/* cffi: end */

/*
 * One request. The caller owns it from submission to completion only to wait; the device owns it in
 * between. @iov and the memory that it points at stay valid until then. The iovecs describe exactly
 * @length bytes for READ, WRITE and COMPARE, twice as many for COMPARE_AND_WRITE; their addresses and lengths
 * have any alignment.
 */
struct bdev_io {
	struct bdev *bdev;
	void (*done)(struct bdev_io *io, int status); /* once; 0 or -errno */
	struct iovec *iov;
	uint64_t length; /* bytes, a multiple of the block size */
	uint64_t offset; /* bytes, a multiple of the block size */
	uint32_t iovcnt;
	uint8_t op; /* enum bdev_op */
	uint8_t flags;
	uint8_t epoch;	      /* of the handle when it was submitted, and enum bdev_mark */
	uint8_t stage;	      /* enum bdev_stage, of those that do not go straight to the device */
	uint64_t submitted;   /* ticks */
	struct bdev_io *next; /* for whoever owns the request: a queue of waiting ones */
	void *scratch[2];     /* for the device */
	union {
		uint64_t source;     /* of a COPY: bytes */
		uint64_t miscompare; /* of a comparison that failed: the first byte that differs, from 0 */
	};
	uint64_t token[2];	       /* of a COMPARE_AND_WRITE: whose it is, for BDEV_IO_AGAIN */
	struct bdev_io *older, *newer; /* for bdev/watch.c */
};

#define BDEV_EASY (1ULL << 62) /* bytes: no limit */

struct bdev_qos;
struct bdev_ranges;
struct bdev_emulator;
struct bdev_watch;
struct bdev_divider;

struct bdev_ops {
	/*
	 * Carry out @io, whose range, operation and alignment bdev_submit() has checked, and which is within
	 * the limits that the device has set (bdev/divide.h). It must end in exactly one bdev_complete(),
	 * before submit() returns or later. Never fails for want of resources: a device that is full keeps the
	 * request (io->next) and submits it when it can.
	 */
	void (*submit)(struct bdev *bdev, struct bdev_io *io);
	/* The device has another size, bytes: make room. 0 or -errno. May be NULL. */
	int (*resize)(struct bdev *bdev, uint64_t size);
	/*
	 * The handle was removed: end, with -ENODEV, what is being held back, which nobody would wait for.
	 * May be NULL.
	 */
	void (*remove)(struct bdev *bdev);
	/*
	 * End @io, which was submitted and has not completed, before its time: 0, and it completes with
	 * -ECANCELED unless it was carried out meanwhile; or -ENOTSUP, and it goes on as before. May be NULL.
	 */
	int (*abort)(struct bdev *bdev, struct bdev_io *io);
	/*
	 * What the device has storage for: as bdev_extent() of bdev/extent.h, which has checked @offset and set
	 * *@length to what is left from there on. Called of those that are sparse.
	 */
	int (*extent)(struct bdev *bdev, uint64_t offset, uint64_t *length);
	/*
	 * Of a device with a boundary: how many bytes from @offset on one request may have, where that is not
	 * up to the next multiple of it. May be NULL.
	 */
	uint64_t (*room)(const struct bdev *bdev, uint64_t offset);
	/* Free the handle. Nothing is in flight. */
	void (*close)(struct bdev *bdev);
};

struct bdev {
	const struct bdev_ops *ops;
	struct reactor *reactor;
	struct bdev_stats *stats;
	uint64_t size;	      /* bytes */
	uint64_t block_mask;  /* block_size - 1 */
	uint64_t easy_length; /* within all limits are ... bytes from a multiple of easy_mask + 1 on ... */
	uint64_t easy_mask;
	uint32_t easy_segments; /* ... in so many buffers: bdev/divide.h */
	uint32_t block_size;	/* bytes, a power of two, 512 or more */
	uint32_t supported;	/* 1 << enum bdev_op */
	uint32_t native;	/* of these, what its submit() carries out */
	uint32_t plain;		/* of these, what bdev_submit() can check for itself */
	uint32_t direct;	/* of these, what goes straight to the device, */
	uint32_t guarded;	/* what does unless a range is locked; neither: bdev/detour.c has to see it */
	struct bdev_histograms *histograms;
	uint64_t id; /* source of notices */
	bool readonly;
	bool sparse; /* ops->extent() knows its holes, and what was unmapped is one, or unchanged */
	bool removed;
	bool drained;		/* and NOTICE_DRAINED was sent */
	uint8_t epoch;		/* bit 0 flips when a RESET begins to wait; the others: enum bdev_mark */
	uint64_t in_flight;	/* ours alone; stats->in_flight shows it to others */
	uint32_t held;		/* by work of the device's own: bdev_hold() */
	uint64_t before_reset;	/* in flight of the other epoch: what the first of resets waits for */
	struct bdev_io *resets; /* waiting, oldest first */
	const uint8_t *memory;	/* the contents, where they are in memory; else NULL */
	/* What few handles have, and then requests make a detour for; each NULL while there is none. */
	struct bdev_qos *qos;		/* limits: bdev/qos.h */
	struct bdev_ranges *ranges;	/* that are locked: bdev/ranges.h */
	struct bdev_watch *watch;	/* requests that take too long: bdev/watch.h */
	struct bdev_emulator *emulator; /* operations that the device has not: bdev/emulate.h */
	struct bdev_divider *divider;	/* requests over its limits: bdev/divide.h */
};

void bdev_init(struct bdev *bdev, const struct bdev_ops *ops, struct reactor *reactor, uint64_t id,
	       uint32_t slot, uint32_t block_size, uint64_t block_count, uint32_t supported, bool readonly);
/* For devices that find out only after bdev_init() what they support. */
void bdev_set_supported(struct bdev *bdev, uint32_t native, bool readonly);

/*
 * Check and start a request: io->done is called with -EINVAL (not whole blocks), -ERANGE (past the end),
 * -EOPNOTSUPP, -EROFS or -ENODEV (removed) when it cannot start. A range of no blocks succeeds at once.
 */
void bdev_submit(struct bdev_io *io);
/*
 * Ask for the end of a request that has not completed: 0, and it completes, now or later, with -ECANCELED
 * unless it was carried out meanwhile; or -ENOTSUP, and it goes on as before, as the device cannot take it
 * back.
 */
int bdev_abort(struct bdev_io *io);
/* For devices: the request has ended. @io belongs to its caller again. */
void bdev_complete(struct bdev_io *io, int status);
/*
 * For devices whose RESET has nothing to do but wait: complete @io once all that was submitted before it
 * has completed. Requests may go on being submitted meanwhile.
 */
void bdev_complete_when_quiet(struct bdev_io *io);

/*
 * For devices: something is under way that is no request to this device, such as a rebuild. Until the same
 * number of bdev_release() the handle is neither closed nor drained. A RESET does not wait for it.
 */
void bdev_hold(struct bdev *bdev);
void bdev_release(struct bdev *bdev);

/* Count a request that has ended; returns the ticks that it took. */
static inline uint64_t bdev_count(struct bdev_stats *stats, const struct bdev_io *io, int status, uint64_t now)
{
	/* What completes in the turn of its submission took less than can be told: one tick. */
	uint64_t ticks = now > io->submitted ? now - io->submitted : 1;
	unsigned op = io->op;

	stats->ops[op]++;
	stats->ticks[op] += ticks;
	if (__builtin_expect(status == 0, 1)) {
		stats->bytes[op] += io->length;
	} else {
		stats->errors++;
	}
	if (__builtin_expect(ticks > stats->max_ticks[op], 0)) {
		stats->max_ticks[op] = ticks;
	}
	if (__builtin_expect(ticks - 1 < stats->min_ticks[op] - 1, 0)) { /* none is 0, and 0 - 1 the largest */
		stats->min_ticks[op] = ticks;
	}
	return ticks;
}

/*
 * A hint that a request, not checked yet, will be submitted soon: worth giving when several are at hand, one
 * or more ahead of the one that is submitted. Costs nothing where it does not help. Inlined in any case: the
 * compiler takes a function that only prefetches for one without effect, and drops calls of it.
 */
static inline __attribute__((always_inline)) void bdev_prefetch(const struct bdev *bdev, uint64_t offset,
								uint64_t length, bool write)
{
	/* The hardware's own prefetcher follows from there; later where the lines are to be written. */
	enum { READ = 512, WRITE = 1024, LINE = 64 };
	const uint8_t *at;

	if (!bdev->memory || offset > bdev->size - READ) {
		return;
	}
	at = bdev->memory + offset;
	if (!write) {
		for (unsigned i = 0; i < READ; i += LINE) {
			__builtin_prefetch(at + i);
		}
		return;
	}
	for (unsigned i = 0; i < READ; i += LINE) {
		__builtin_prefetch(at + i, 1);
	}
	if (length >= WRITE && length <= bdev->size - offset) {
		for (unsigned i = READ; i < WRITE; i += LINE) {
			__builtin_prefetch(at + i, 1);
		}
	}
}

#endif
