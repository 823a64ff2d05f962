/*
 * The load generator: one struct load drives one queue of a virtio-blk device (virtio 1.2, section 5.2), or a
 * request queue of a virtio-scsi device (section 5.6), at a fixed depth, as fast as the device answers or at a
 * given rate.
 *
 * It measures targets that need some tens of nanoseconds a request, so its own part must be small and
 * the same for every target: each slot (one of `depth` requests) has its descriptors laid out before,
 * its header and status in a cache line of its own, and per request only what differs is written: the
 * header's type and sector, and the data descriptors (of a packed ring: all of them). Requests are published,
 * kicked and reaped in batches, and the clock is read once for each.
 */
#ifndef VHOST_WORKLOAD_H
#define VHOST_WORKLOAD_H

#include "vhost/frontend.h"

/* cffi: begin */
#define LOAD_READ 0
#define LOAD_WRITE 1

/*
 * Latencies are counted by ticks in buckets that are exact up to 64 and have a width of 1/64 of their
 * power of two above.
 */
#define LOAD_BUCKETS 3776
#define LOAD_BUCKET_BITS 6

#define LOAD_SLOT_SIZE 64	/* header and status of a slot, in guest memory */
#define LOAD_SCSI_SLOT_SIZE 192 /* header and response */
#define LOAD_RESPONSE 512	/* an error status: what follows is a response code of virtio-scsi */
#define LOAD_MISMATCHES 16
#define LOAD_MAX_DEPTH 32768

struct load_options {
	uint64_t offset;     /* bytes: where the range begins */
	uint64_t size;	     /* bytes of the range, a multiple of block_size */
	uint32_t block_size; /* bytes a request, a multiple of 512 */
	uint32_t depth;
	uint32_t read_percent; /* 100: only reads */
	uint32_t segment_size; /* largest data buffer: block_size, or less when the device has a limit */
	bool random;
	bool verify;
	bool interrupt; /* sleep until the device signals; otherwise poll */
	bool indirect;
	bool scsi;
	bool long_cdb;		 /* LBAs of 64 bits */
	uint8_t lun[8];		 /* virtio 1.2, section 5.6.6.1 */
	uint32_t logical_block;	 /* bytes, of a SCSI disk */
	uint64_t requests;	 /* end after that many; 0: no limit */
	uint64_t interval_ticks; /* open loop: a request is due every so often; 0: closed loop */
	uint64_t stall_ticks;	 /* give up when nothing comes back for that long */
	uint32_t seed;
	void *slots; /* load_slot_bytes() * depth of guest memory, and its guest-physical address */
	uint64_t slots_addr;
	void *data; /* block_size * depth of guest memory */
	uint64_t data_addr;
};

struct load_mismatch {
	uint64_t offset;   /* bytes, on the device */
	uint64_t expected; /* eight bytes in the machine's order */
	uint64_t got;
};

/* Written by the thread that runs the load, read by anyone. Times are ticks. */
struct load_results {
	uint64_t started;
	uint64_t ended;
	uint64_t ops[2]; /* completed without error, by LOAD_READ or LOAD_WRITE */
	uint64_t latency_sum[2];
	uint64_t latency_min[2];
	uint64_t latency_max[2];
	uint64_t errors;
	uint64_t error_offset; /* of the first */
	uint32_t error_status; /* of the first: the device's status byte, or 256 when it wrote none */
	uint32_t error_type;
	uint64_t verified;   /* blocks read that were as expected */
	uint64_t unwritten;  /* sectors read that hold no pattern, so that nothing can be said of them */
	uint64_t mismatches; /* blocks */
	uint64_t batches;    /* times that the used index was seen to have moved */
	struct load_mismatch mismatch[16]; /* the first ones */
	uint64_t histogram[2][3776];
};

struct load;

uint32_t load_slot_bytes(const struct load_options *options);
/* How many descriptors of the ring a request takes. */
uint32_t load_ring_descriptors(const struct load_options *options);
/*
 * Get ready to drive @queue, which must be idle. NULL and errno: -EINVAL when an option cannot be, -ENOSPC when
 * the ring is too small for the depth.
 */
struct load *load_create(struct front_queue *queue, const struct load_options *options);
/* The queue's descriptors are free again; nothing may be in flight. */
void load_destroy(struct load *load);
/*
 * Drive every load of the array until all have ended: at @deadline (ticks), at load_stop(), or after the number
 * of requests asked for; then wait for what is in flight. Returns 0, -ETIMEDOUT when a device answers no more,
 * or -EPROTO when it returns what it was not given. Several threads may run different loads.
 */
int load_run(struct load *const *loads, uint32_t count, uint64_t deadline);
/* End soon, after waiting for answers or (@drain false) without. From any thread. */
void load_stop(struct load *load, bool drain);
const struct load_results *load_results(const struct load *load);
/* The smallest latency of a bucket, in ticks. */
uint64_t load_bucket_floor(uint32_t bucket);
/* cffi: end */

#endif
