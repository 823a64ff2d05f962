#include "vhost/workload_internal.h"
#include "reactor/ticks.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <time.h>

#define PREFETCH_AHEAD 8  /* used entries */
#define IDLE_ROUNDS 4096  /* rounds without work between looks at clock and flags */
#define NAP_NS 50000000	  /* longest sleep: load_stop() is seen after that */
#define MAX_SLEEPERS 1024 /* loads of one thread that sleeps */

#define WIRE_IN 0  /* VIRTIO_BLK_T_IN */
#define WIRE_OUT 1 /* VIRTIO_BLK_T_OUT */
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/*
 * Statistics.
 */

static uint32_t bucket_of(uint64_t value)
{
	uint32_t power;

	if (value < 1u << LOAD_BUCKET_BITS) {
		return (uint32_t)value;
	}
	power = 63 - (uint32_t)__builtin_clzll(value) - LOAD_BUCKET_BITS;
	return ((power + 1) << LOAD_BUCKET_BITS) + (uint32_t)((value >> power) & ((1 << LOAD_BUCKET_BITS) - 1));
}

uint64_t load_bucket_floor(uint32_t bucket)
{
	uint64_t low = bucket & ((1 << LOAD_BUCKET_BITS) - 1);
	uint32_t power = bucket >> LOAD_BUCKET_BITS;

	return power == 0 ? low : (low + (1 << LOAD_BUCKET_BITS)) << (power - 1);
}

static inline void count(struct load *load, const struct load_slot *slot, uint64_t now)
{
	struct load_results *results = &load->results;
	uint64_t latency = now - slot->started;
	unsigned kind = slot->kind;

	results->ops[kind]++;
	results->latency_sum[kind] += latency;
	results->histogram[kind][bucket_of(latency)]++;
	if (latency > results->latency_max[kind]) {
		results->latency_max[kind] = latency;
	}
	if (latency < results->latency_min[kind] || results->ops[kind] == 1) {
		results->latency_min[kind] = latency;
	}
}

static inline uint32_t status_of(const struct load *load, const struct load_slot *slot)
{
	return load->options.scsi ? load_scsi_status(slot) : slot->wire->status;
}

static __attribute__((noinline)) void count_error(struct load *load, const struct load_slot *slot)
{
	struct load_results *results = &load->results;

	if (results->errors++ == 0) {
		uint32_t status = status_of(load, slot);

		results->error_offset = load_slot_offset(load, slot);
		results->error_status = status == LOAD_NO_STATUS ? LOAD_NO_STATUS_WRITTEN : status;
		results->error_type = slot->kind == SLOT_WRITE ? LOAD_WRITE : LOAD_READ;
	}
}

/*
 * The data path.
 */

static inline void issue_split(struct load *load, struct load_slot *slot)
{
	struct front_queue *queue = load->queue;
	uint16_t write = slot->kind == SLOT_WRITE ? 0 : VRING_DESC_WRITE;
	uint64_t addr = slot->data_addr;

	for (uint32_t i = 0; i < load->buffers; i++) {
		slot->buffers[i].addr = addr;
		slot->buffers[i].flags = VRING_DESC_NEXT | write;
		addr += load->options.segment_size;
	}
	queue->avail->ring[queue->avail_idx & queue->mask] = slot->head;
	queue->avail_idx++;
}

static inline void issue(struct load *load, struct load_slot *slot)
{
	struct wire_request *wire = slot->wire;

	if (unlikely(load->generations)) {
		load_prepare_data(load, slot);
	}
	if (load->options.scsi) {
		load_issue_scsi(load, slot);
	} else {
		wire->type = slot->kind == SLOT_WRITE ? WIRE_OUT : WIRE_IN;
		wire->sector = load_slot_offset(load, slot) / LOAD_SECTOR;
		wire->status = LOAD_NO_STATUS;
		if (load->queue->packed) {
			load_issue_packed(load, slot);
		} else {
			issue_split(load, slot);
		}
	}
	load->in_flight++;
	load->sent++;
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
		struct load_slot *slot = &load->slots[load->free[load->free_count - 1]];

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

static __attribute__((noinline)) void finish_verified(struct load *load, struct load_slot *slot, bool good)
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
		load_check_data(load, slot);
	}
	*generation &= ~GENERATION_BUSY;
	slot->kind = SLOT_FREE;
	load->free[load->free_count++] = (uint16_t)(slot - load->slots);
}

static inline void finish(struct load *load, struct load_slot *slot, uint64_t now)
{
	bool good = status_of(load, slot) == 0;

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

/* The slot of a chain, or NULL when the device returns what it was never given. */
static inline struct load_slot *slot_of(const struct load *load, uint32_t head)
{
	uint16_t slot = head < load->queue->size ? load->slot_of_head[head] : LOAD_NO_SLOT;

	return likely(slot != LOAD_NO_SLOT) ? &load->slots[slot] : NULL;
}

/* The slot of an entry of a split ring's used ring. */
static inline struct load_slot *used_slot(const struct load *load, uint16_t index)
{
	const struct front_queue *queue = load->queue;

	return slot_of(load, __atomic_load_n(&queue->used->ring[index & queue->mask].id, __ATOMIC_RELAXED));
}

static int reap_packed(struct load *load, uint64_t now)
{
	struct front_queue *queue = load->queue;
	uint16_t taken = (uint16_t)load_ring_descriptors(&load->options);
	/* What is issued meanwhile waits for the next turn. */
	uint32_t most = load->in_flight;
	uint32_t n;

	for (n = 0; n < most && front_packed_ready(queue); n++) {
		uint16_t id = __atomic_load_n(&queue->ring[queue->used_idx].id, __ATOMIC_RELAXED);
		struct load_slot *slot = slot_of(load, id);

		if (unlikely(!slot || slot->kind == SLOT_FREE)) {
			return -EPROTO;
		}
		front_packed_advance(queue, &queue->used_idx, &queue->used_wrap, taken);
		finish(load, slot, now);
	}
	return n ? (int)n : -EPROTO;
}

static int reap_split(struct load *load, uint16_t ready, uint64_t now)
{
	struct front_queue *queue = load->queue;

	if (unlikely(ready > load->in_flight)) {
		return -EPROTO;
	}
	for (uint16_t i = 0; i < ready; i++) {
		struct load_slot *slot = used_slot(load, queue->used_idx);

		if (i + PREFETCH_AHEAD < ready) {
			struct load_slot *later = used_slot(load, (uint16_t)(queue->used_idx + PREFETCH_AHEAD));

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
	return ready;
}

/* Take what came back; how many, or -EPROTO. */
static int reap(struct load *load, uint16_t ready, uint64_t now)
{
	int rc = load->queue->packed ? reap_packed(load, now) : reap_split(load, ready, now);

	if (likely(rc > 0)) {
		load->results.batches++;
		load->last_progress = now;
	}
	return rc;
}

static void change_phase(struct load *load, uint64_t now, uint64_t deadline)
{
	uint8_t stop = __atomic_load_n(&load->stop, __ATOMIC_RELAXED);

	if (load->phase == LOAD_RUNNING && (now >= deadline || stop != GO_ON)) {
		load->phase = LOAD_DRAINING;
	}
	if (load->in_flight && now - load->last_progress > load->options.stall_ticks) {
		load->failure = -ETIMEDOUT;
	}
	if (load->failure || stop == STOP_NOW || (load->phase == LOAD_DRAINING && load->in_flight == 0)) {
		load->phase = LOAD_ENDED;
		load->results.ended = now;
	}
}

/* One round of one load; returns how many requests came back or went out. */
static uint32_t turn(struct load *load, uint64_t deadline, bool look)
{
	uint16_t ready = front_queue_ready(load->queue);
	uint64_t before = load->sent;
	int reaped = 0;
	uint64_t now;

	/* Without news there is nothing to do, except that an open loop may be due. */
	if (ready == 0 && !look && (load->free_count == 0 || !load->options.interval_ticks)) {
		return 0;
	}
	now = ticks();
	if (ready && !load->failure) {
		reaped = reap(load, ready, now);
		load->failure = reaped < 0 ? reaped : 0;
	}
	change_phase(load, now, deadline);
	if (likely(load->phase == LOAD_RUNNING)) {
		issue_due(load, now);
	}
	if (likely(!load->failure)) {
		load->failure = front_queue_publish(load->queue);
	}
	return (reaped > 0 ? (uint32_t)reaped : 0) + (uint32_t)(load->sent - before);
}

/* When the load must be looked at again even if its device stays silent. */
static uint64_t nap_ns(const struct load *load, uint64_t deadline)
{
	uint64_t now = ticks();
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
	uint64_t now = ticks();
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

void load_stop(struct load *load, bool drain)
{
	__atomic_store_n(&load->stop, drain ? STOP_SOON : STOP_NOW, __ATOMIC_RELAXED);
}

const struct load_results *load_results(const struct load *load)
{
	return &load->results;
}
