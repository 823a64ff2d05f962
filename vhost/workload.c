#define _GNU_SOURCE /* ppoll() */
#include "vhost/workload.h"
#include "vhost/pattern.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SECTOR 512
#define CACHE_LINE 64
#define NO_STATUS 0xff        /* what we put where the device shall write its status */
#define NO_STATUS_WRITTEN 256 /* how load_results calls that */
#define NO_SLOT 0xffff
#define PREFETCH_AHEAD 8  /* used entries */
#define IDLE_ROUNDS 4096  /* rounds without work between looks at clock and flags */
#define NAP_NS 50000000   /* longest sleep: load_stop() is seen after that */
#define MAX_SLEEPERS 1024 /* loads of one thread that sleeps */

#define GENERATION_BUSY 0x80000000u    /* a request for the block is in flight */
#define GENERATION_UNKNOWN 0x7fffffffu /* a write failed: the block may hold anything */

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* virtio 1.2, section 5.2.6; the status byte is the device's. */
struct wire_request {
	uint32_t type;
	uint32_t reserved;
	uint64_t sector;
	uint8_t status;
	uint8_t padding[LOAD_SLOT_SIZE - 17];
};

_Static_assert(sizeof(struct wire_request) == LOAD_SLOT_SIZE, "a cache line");
_Static_assert(offsetof(struct wire_request, status) == 16, "virtio 5.2.6");

#define WIRE_IN 0  /* VIRTIO_BLK_T_IN */
#define WIRE_OUT 1 /* VIRTIO_BLK_T_OUT */

enum slot_kind {
	SLOT_READ = LOAD_READ,
	SLOT_WRITE = LOAD_WRITE,
	SLOT_READ_BACK, /* of a block just written, to verify it */
	SLOT_FREE,
};

struct slot {
	uint64_t started; /* ticks */
	uint64_t block;
	struct wire_request *wire;
	struct vring_desc *buffers; /* descriptors of the data */
	uint64_t data_addr;
	uint8_t *data;
	uint16_t head;
	uint8_t kind; /* enum slot_kind */
	uint32_t generation;
} __attribute__((aligned(CACHE_LINE)));

enum load_phase { LOAD_RUNNING, LOAD_DRAINING, LOAD_ENDED };

struct load {
	struct front_queue *queue;
	struct slot *slots;
	uint16_t *slot_of_head;
	uint16_t *free; /* a stack */
	uint32_t free_count;
	uint32_t in_flight;
	uint32_t buffers; /* data descriptors a request */
	enum load_phase phase;
	struct load_options options;
	uint64_t blocks;
	uint64_t cursor; /* next block in sequence */
	uint64_t random;
	uint64_t issued;
	uint64_t due; /* ticks, of the next request of an open loop */
	uint64_t last_progress;
	uint32_t generation;
	uint32_t *generations; /* by block: the last write, with GENERATION_BUSY; NULL when not verifying */
	int failure;
	bool stop;
	struct load_results results;
};

static uint32_t buffers_of(const struct load_options *options)
{
	return (options->block_size + options->segment_size - 1) / options->segment_size;
}

uint32_t load_ring_descriptors(const struct load_options *options)
{
	return options->indirect ? 1 : buffers_of(options) + 2;
}

uint32_t load_slot_bytes(const struct load_options *options)
{
	uint32_t table = (buffers_of(options) + 2) * (uint32_t)sizeof(struct vring_desc);

	return LOAD_SLOT_SIZE + (options->indirect ? (table + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE : 0);
}

/*
 * Layout.
 */

/* Descriptors from one slot's head to the next: a whole cache line where the ring has room for that. */
static uint32_t ring_stride(const struct front_queue *queue, const struct load_options *options)
{
	uint32_t needed = load_ring_descriptors(options);
	uint32_t line = CACHE_LINE / sizeof(struct vring_desc);
	uint32_t rounded = (needed + line - 1) / line * line;

	return !options->indirect && rounded * options->depth <= queue->size ? rounded : needed;
}

static void lay_out_chain(struct load *load, struct slot *slot, struct vring_desc *descs, uint16_t first,
                          uint64_t wire_addr)
{
	const struct load_options *options = &load->options;
	uint32_t i;

	descs[0] = (struct vring_desc){wire_addr, 16, VRING_DESC_NEXT, (uint16_t)(first + 1)};
	for (i = 1; i <= load->buffers; i++) {
		descs[i] = (struct vring_desc){.flags = VRING_DESC_NEXT, .next = (uint16_t)(first + i + 1)};
		descs[i].len = i < load->buffers ? options->segment_size
		                                 : options->block_size - (i - 1) * options->segment_size;
	}
	descs[i] =
	    (struct vring_desc){wire_addr + offsetof(struct wire_request, status), 1, VRING_DESC_WRITE, 0};
	slot->buffers = descs + 1;
}

static void lay_out(struct load *load, uint32_t index)
{
	const struct load_options *options = &load->options;
	struct slot *slot = &load->slots[index];
	uint64_t at = (uint64_t)index * load_slot_bytes(options);
	uint64_t wire_addr = options->slots_addr + at;

	slot->wire = (struct wire_request *)((uint8_t *)options->slots + at);
	slot->data = (uint8_t *)options->data + (uint64_t)index * options->block_size;
	slot->data_addr = options->data_addr + (uint64_t)index * options->block_size;
	slot->head = (uint16_t)(index * ring_stride(load->queue, options));
	slot->kind = SLOT_FREE;
	slot->wire->reserved = 0;
	if (options->indirect) {
		lay_out_chain(load, slot, (struct vring_desc *)(slot->wire + 1), 0, wire_addr);
		load->queue->desc[slot->head] = (struct vring_desc){
		    wire_addr + LOAD_SLOT_SIZE, (load->buffers + 2) * (uint32_t)sizeof(struct vring_desc),
		    VRING_DESC_INDIRECT, 0};
	} else {
		lay_out_chain(load, slot, &load->queue->desc[slot->head], slot->head, wire_addr);
	}
	load->slot_of_head[slot->head] = (uint16_t)index;
	load->free[index] = (uint16_t)index;
	for (uint32_t i = 0; i < options->block_size; i += SECTOR) {
		pattern_fill((uint64_t *)(slot->data + i), i, index); /* not zeroes: those may be cheaper */
	}
}

static int check_options(const struct front_queue *queue, const struct load_options *options)
{
	if (options->block_size == 0 || options->block_size % SECTOR || options->segment_size == 0 ||
	    options->segment_size % SECTOR || options->size < options->block_size ||
	    options->size % options->block_size || options->offset % SECTOR || options->depth == 0 ||
	    options->depth > LOAD_MAX_DEPTH || options->read_percent > 100 || queue->pending) {
		return EINVAL;
	}
	/* A block is in flight once at most while verifying, so there must be others to choose. */
	if (options->verify && options->size / options->block_size <= options->depth) {
		return EINVAL;
	}
	return (uint64_t)load_ring_descriptors(options) * options->depth > queue->size ? ENOSPC : 0;
}

static void free_load(struct load *load)
{
	free(load->slots);
	free(load->slot_of_head);
	free(load->free);
	free(load->generations);
	free(load);
}

struct load *load_create(struct front_queue *queue, const struct load_options *options)
{
	int error = check_options(queue, options);
	struct load *load = error ? NULL : aligned_alloc(CACHE_LINE, (sizeof(*load) + 63) / 64 * 64);

	if (!load) {
		errno = error ? error : ENOMEM;
		return NULL;
	}
	memset(load, 0, sizeof(*load));
	load->queue = queue;
	load->options = *options;
	load->buffers = buffers_of(options);
	load->blocks = options->size / options->block_size;
	load->random = (uint64_t)options->seed * 0x9e3779b97f4a7c15 + 1;
	load->slots = aligned_alloc(CACHE_LINE, options->depth * sizeof(*load->slots));
	load->slot_of_head = malloc(queue->size * sizeof(*load->slot_of_head));
	load->free = malloc(options->depth * sizeof(*load->free));
	load->generations = options->verify ? calloc(load->blocks, sizeof(*load->generations)) : NULL;
	if (!load->slots || !load->slot_of_head || !load->free || (options->verify && !load->generations)) {
		free_load(load);
		errno = ENOMEM;
		return NULL;
	}
	memset(load->slot_of_head, 0xff, queue->size * sizeof(*load->slot_of_head)); /* NO_SLOT */
	for (uint32_t i = 0; i < options->depth; i++) {
		lay_out(load, i);
	}
	load->free_count = options->depth;
	return load;
}

void load_destroy(struct load *load)
{
	if (load) {
		front_queue_reset(load->queue);
		free_load(load);
	}
}

/*
 * Statistics.
 */

static uint32_t bucket_of(uint64_t ticks)
{
	uint32_t power;

	if (ticks < 1u << LOAD_BUCKET_BITS) {
		return (uint32_t)ticks;
	}
	power = 63 - (uint32_t)__builtin_clzll(ticks) - LOAD_BUCKET_BITS;
	return ((power + 1) << LOAD_BUCKET_BITS) + (uint32_t)((ticks >> power) & ((1 << LOAD_BUCKET_BITS) - 1));
}

uint64_t load_bucket_floor(uint32_t bucket)
{
	uint64_t low = bucket & ((1 << LOAD_BUCKET_BITS) - 1);
	uint32_t power = bucket >> LOAD_BUCKET_BITS;

	return power == 0 ? low : (low + (1 << LOAD_BUCKET_BITS)) << (power - 1);
}

static inline void count(struct load *load, const struct slot *slot, uint64_t now)
{
	struct load_results *results = &load->results;
	uint64_t ticks = now - slot->started;
	unsigned kind = slot->kind;

	results->ops[kind]++;
	results->latency_sum[kind] += ticks;
	results->histogram[kind][bucket_of(ticks)]++;
	if (ticks > results->latency_max[kind]) {
		results->latency_max[kind] = ticks;
	}
	if (ticks < results->latency_min[kind] || results->ops[kind] == 1) {
		results->latency_min[kind] = ticks;
	}
}

static uint64_t slot_offset(const struct load *load, const struct slot *slot)
{
	return load->options.offset + slot->block * load->options.block_size;
}

static __attribute__((noinline)) void count_error(struct load *load, const struct slot *slot)
{
	struct load_results *results = &load->results;

	if (results->errors++ == 0) {
		uint8_t status = slot->wire->status;

		results->error_offset = slot_offset(load, slot);
		results->error_status = status == NO_STATUS ? NO_STATUS_WRITTEN : status;
		results->error_type = slot->kind == SLOT_WRITE ? LOAD_WRITE : LOAD_READ;
	}
}

/*
 * Verification. While a request for a block is in flight no other is, so what it must hold is known.
 */

static uint64_t stamp_of(const struct load *load, uint32_t generation)
{
	return (uint64_t)load->options.seed << 32 | generation;
}

static void prepare_data(struct load *load, struct slot *slot)
{
	uint64_t offset = slot_offset(load, slot);

	if (slot->kind != SLOT_WRITE) {
		/* What is there may be just what is expected. */
		memset(slot->data, 0x5a, load->options.block_size);
		return;
	}
	load->generation++;
	slot->generation = load->generation;
	for (uint32_t i = 0; i < load->options.block_size; i += SECTOR) {
		pattern_fill((uint64_t *)(slot->data + i), offset + i, stamp_of(load, slot->generation));
	}
}

static void check_data(struct load *load, const struct slot *slot)
{
	struct load_results *results = &load->results;
	uint32_t generation = load->generations[slot->block] & ~GENERATION_BUSY;
	uint64_t offset = slot_offset(load, slot);

	if (generation == GENERATION_UNKNOWN) {
		return;
	}
	for (uint32_t i = 0; i < load->options.block_size; i += SECTOR) {
		const uint64_t *sector = (const uint64_t *)(slot->data + i);
		struct pattern_difference found;
		enum pattern_verdict verdict =
		    generation ? pattern_check(sector, offset + i, stamp_of(load, generation), &found)
		               : pattern_check_unknown(sector, offset + i, &found);

		if (verdict == PATTERN_BAD) {
			if (results->mismatches < LOAD_MISMATCHES) {
				results->mismatch[results->mismatches] =
				    (struct load_mismatch){found.offset, found.expected, found.got};
			}
			results->mismatches++;
			return;
		}
		results->unwritten += verdict == PATTERN_NONE;
	}
	results->verified++;
}

/*
 * The data path.
 */

static inline void issue(struct load *load, struct slot *slot)
{
	struct front_queue *queue = load->queue;
	struct wire_request *wire = slot->wire;
	bool write = slot->kind == SLOT_WRITE;
	uint16_t flags = write ? VRING_DESC_NEXT : VRING_DESC_NEXT | VRING_DESC_WRITE;
	uint64_t addr = slot->data_addr;

	if (unlikely(load->generations)) {
		prepare_data(load, slot);
	}
	wire->type = write ? WIRE_OUT : WIRE_IN;
	wire->sector = slot_offset(load, slot) / SECTOR;
	wire->status = NO_STATUS;
	for (uint32_t i = 0; i < load->buffers; i++) {
		slot->buffers[i].addr = addr;
		slot->buffers[i].flags = flags;
		addr += load->options.segment_size;
	}
	queue->avail->ring[queue->avail_idx & queue->mask] = slot->head;
	queue->avail_idx++;
	load->in_flight++;
}

/* xorshift64*: one multiplication a number, and its upper half is good. */
static inline uint64_t next_random(struct load *load)
{
	uint64_t x = load->random;

	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	load->random = x;
	return x * 0x2545f4914f6cdd1d;
}

static inline uint64_t next_block(struct load *load)
{
	uint64_t block;

	if (load->options.random) {
		block = (uint64_t)(((unsigned __int128)next_random(load) * load->blocks) >> 64);
	} else {
		block = load->cursor;
		load->cursor = block + 1 == load->blocks ? 0 : block + 1;
	}
	if (unlikely(load->generations)) {
		while (load->generations[block] & GENERATION_BUSY) {
			block = block + 1 == load->blocks ? 0 : block + 1;
		}
		load->generations[block] |= GENERATION_BUSY;
	}
	return block;
}

static inline uint8_t next_kind(struct load *load)
{
	uint32_t percent = load->options.read_percent;

	if (percent == 100) {
		return SLOT_READ;
	}
	return percent && (next_random(load) >> 32) * 100 >> 32 < percent ? SLOT_READ : SLOT_WRITE;
}

/* Fill free slots with requests that are due. */
static void issue_due(struct load *load, uint64_t now)
{
	const struct load_options *options = &load->options;

	if (load->in_flight == 0) {
		load->last_progress = now;
	}
	while (load->free_count) {
		struct slot *slot = &load->slots[load->free[load->free_count - 1]];

		if (options->requests && load->issued == options->requests) {
			load->phase = LOAD_DRAINING;
			break;
		}
		slot->started = now;
		if (options->interval_ticks) {
			if ((int64_t)(now - load->due) < 0) {
				break;
			}
			/* Late because of the device counts: latency begins when the request was due. */
			slot->started = load->due;
			load->due += options->interval_ticks;
		}
		load->free_count--;
		load->issued++;
		slot->kind = next_kind(load);
		slot->block = next_block(load);
		issue(load, slot);
	}
}

static __attribute__((noinline)) void finish_verified(struct load *load, struct slot *slot, bool good)
{
	uint32_t *generation = &load->generations[slot->block];

	if (slot->kind == SLOT_WRITE) {
		*generation = GENERATION_BUSY | (good ? slot->generation : GENERATION_UNKNOWN);
		if (good) {
			slot->kind = SLOT_READ_BACK;
			issue(load, slot);
			return;
		}
	} else if (good) {
		check_data(load, slot);
	}
	*generation &= ~GENERATION_BUSY;
	slot->kind = SLOT_FREE;
	load->free[load->free_count++] = (uint16_t)(slot - load->slots);
}

static inline void finish(struct load *load, struct slot *slot, uint64_t now)
{
	bool good = slot->wire->status == 0;

	load->in_flight--;
	if (unlikely(!good)) {
		count_error(load, slot);
	} else if (likely(slot->kind != SLOT_READ_BACK)) {
		count(load, slot, now);
	}
	if (unlikely(load->generations)) {
		finish_verified(load, slot, good);
		return;
	}
	slot->kind = SLOT_FREE;
	load->free[load->free_count++] = (uint16_t)(slot - load->slots);
}

/* The slot of a used entry, or NULL when the device returns what it does not have. */
static inline struct slot *used_slot(const struct load *load, uint16_t index)
{
	const struct front_queue *queue = load->queue;
	uint32_t id = __atomic_load_n(&queue->used->ring[index & queue->mask].id, __ATOMIC_RELAXED);
	uint16_t slot = id < queue->size ? load->slot_of_head[id] : NO_SLOT;

	return likely(slot != NO_SLOT) ? &load->slots[slot] : NULL;
}

static int reap(struct load *load, uint16_t ready, uint64_t now)
{
	struct front_queue *queue = load->queue;

	if (unlikely(ready > load->in_flight)) {
		return -EPROTO;
	}
	for (uint16_t i = 0; i < ready; i++) {
		struct slot *slot = used_slot(load, queue->used_idx);

		if (i + PREFETCH_AHEAD < ready) {
			struct slot *later = used_slot(load, (uint16_t)(queue->used_idx + PREFETCH_AHEAD));

			if (later) {
				__builtin_prefetch(later->wire, 1);
			}
		}
		if (unlikely(!slot || slot->kind == SLOT_FREE)) {
			return -EPROTO;
		}
		queue->used_idx++;
		finish(load, slot, now);
	}
	load->results.batches++;
	load->last_progress = now;
	return 0;
}

static void change_phase(struct load *load, uint64_t now, uint64_t deadline)
{
	if (load->phase == LOAD_RUNNING &&
	    (now >= deadline || __atomic_load_n(&load->stop, __ATOMIC_RELAXED))) {
		load->phase = LOAD_DRAINING;
	}
	if (load->in_flight && now - load->last_progress > load->options.stall_ticks) {
		load->failure = -ETIMEDOUT;
	}
	if (load->failure || (load->phase == LOAD_DRAINING && load->in_flight == 0)) {
		load->phase = LOAD_ENDED;
		load->results.ended = now;
	}
}

/* One round of one load; returns how many requests came back or went out. */
static uint32_t turn(struct load *load, uint64_t deadline, bool look)
{
	uint16_t ready = front_queue_ready(load->queue);
	uint16_t before = load->queue->avail_idx;
	uint64_t now;

	/* Without news there is nothing to do, except that an open loop may be due. */
	if (ready == 0 && !look && (load->free_count == 0 || !load->options.interval_ticks)) {
		return 0;
	}
	now = reactor_ticks();
	if (ready) {
		load->failure = reap(load, ready, now);
	}
	change_phase(load, now, deadline);
	if (likely(load->phase == LOAD_RUNNING)) {
		issue_due(load, now);
	}
	if (likely(!load->failure)) {
		load->failure = front_queue_publish(load->queue);
	}
	return ready + (uint16_t)(load->queue->avail_idx - before);
}

/* When the load must be looked at again even if its device stays silent. */
static uint64_t nap_ns(const struct load *load, uint64_t deadline)
{
	uint64_t now = reactor_ticks();
	uint64_t until = deadline;
	double ns;

	if (load->phase == LOAD_RUNNING && load->options.interval_ticks && load->free_count &&
	    load->due < until) {
		until = load->due;
	}
	if (until <= now) {
		return 0;
	}
	ns = (double)(until - now) * 1e9 / (double)reactor_tick_rate();
	return ns < NAP_NS ? (uint64_t)ns : NAP_NS;
}

/* Sleep until a device signals, something is due, or a while has passed. */
static void sleep_all(struct load *const *loads, uint32_t count, uint64_t deadline)
{
	struct pollfd calls[MAX_SLEEPERS];
	uint64_t nap = NAP_NS;
	uint32_t n = 0;
	bool ready = false;

	for (uint32_t i = 0; i < count && n < MAX_SLEEPERS; i++) {
		if (loads[i]->phase != LOAD_ENDED) {
			uint64_t own = nap_ns(loads[i], deadline);

			nap = own < nap && loads[i]->phase == LOAD_RUNNING ? own : nap;
			front_queue_want_call(loads[i]->queue, true);
			ready |= front_queue_ready(loads[i]->queue) != 0;
			calls[n++] = (struct pollfd){.fd = loads[i]->queue->call_fd, .events = POLLIN};
		}
	}
	if (!ready && n) {
		struct timespec limit = {.tv_nsec = (long)nap};

		ppoll(calls, n, &limit, NULL);
	}
	for (uint32_t i = 0; i < count; i++) {
		front_queue_want_call(loads[i]->queue, false);
		front_queue_drain_call(loads[i]->queue);
	}
}

int load_run(struct load *const *loads, uint32_t count, uint64_t deadline)
{
	uint64_t now = reactor_ticks();
	uint32_t running = count;
	uint32_t idle = 0;
	int rc = 0;

	for (uint32_t i = 0; i < count; i++) {
		loads[i]->phase = LOAD_RUNNING;
		loads[i]->failure = 0;
		loads[i]->results.started = loads[i]->due = loads[i]->last_progress = now;
	}
	for (bool look = true; running; look = idle && idle % IDLE_ROUNDS == 0) {
		uint32_t done = 0;

		running = 0;
		for (uint32_t i = 0; i < count; i++) {
			if (loads[i]->phase != LOAD_ENDED) {
				done += turn(loads[i], deadline, look);
				running++;
			}
		}
		idle = done ? 0 : idle + 1;
		if (done == 0 && loads[0]->options.interrupt) {
			sleep_all(loads, count, deadline);
			idle = IDLE_ROUNDS; /* look at the clock after each sleep */
		} else if (look && done == 0) {
			sched_yield(); /* the target may have to share this CPU */
		}
	}
	for (uint32_t i = 0; i < count; i++) {
		rc = rc ? rc : loads[i]->failure;
	}
	return rc;
}

void load_stop(struct load *load)
{
	__atomic_store_n(&load->stop, true, __ATOMIC_RELAXED);
}

const struct load_results *load_results(const struct load *load)
{
	return &load->results;
}
