#include "vhost/frontend.h"
#include "reactor/ticks.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static void cpu_relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

struct front_queue *front_queue_create(void *desc, void *avail, void *used, uint32_t size, bool event_idx,
				       bool packed, int kick_fd, int call_fd)
{
	struct front_queue *queue;

	if (size == 0 || size > VQ_MAX_SIZE || (!packed && (size & (size - 1)))) {
		errno = EINVAL;
		return NULL;
	}
	queue = calloc(1, sizeof(*queue) + 2 * size * sizeof(uint16_t));
	if (!queue) {
		return NULL;
	}
	queue->desc = desc;
	queue->avail = avail;
	queue->used = used;
	queue->size = (uint16_t)size;
	queue->mask = (uint16_t)(size - 1);
	queue->event_idx = event_idx;
	queue->packed = packed;
	queue->kick_fd = kick_fd;
	queue->call_fd = call_fd;
	queue->next = (uint16_t *)(queue + 1);
	queue->chains = queue->next + size;
	if (packed) {
		queue->avail_wrap = queue->used_wrap = true; /* section 2.8.1 */
	} else {
		/* A ring that an earlier session left goes on where it stood. */
		queue->avail_idx = queue->published = front_load_acquire(&queue->avail->idx);
		queue->used_idx = front_load_acquire(&queue->used->idx);
	}
	front_queue_reset(queue);
	front_queue_want_call(queue, false);
	return queue;
}

void front_queue_destroy(struct front_queue *queue)
{
	free(queue);
}

void front_queue_reset(struct front_queue *queue)
{
	for (uint32_t i = 0; i < queue->size; i++) {
		queue->next[i] = (uint16_t)(i + 1);
		queue->chains[i] = FRONT_NO_CHAIN;
	}
	queue->free_head = 0;
	queue->free_count = queue->size;
	queue->pending = 0;
}

/* Write a chain into an indirect table, whose descriptors are linked one after the other. */
static void fill_table(struct vring_desc *table, const struct front_buffer *buffers, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		bool last = i + 1 == count;

		table[i].addr = buffers[i].addr;
		table[i].len = buffers[i].len;
		table[i].flags = (uint16_t)((buffers[i].device_writes ? VRING_DESC_WRITE : 0) |
					    (last ? 0 : VRING_DESC_NEXT));
		table[i].next = last ? 0 : (uint16_t)(i + 1);
	}
}

/* Write a chain into free descriptors of the ring; returns the first free one after it. */
static uint16_t fill_ring(struct front_queue *queue, const struct front_buffer *buffers, uint32_t count)
{
	uint16_t at = queue->free_head;

	for (uint32_t i = 0; i < count; i++) {
		struct vring_desc *desc = &queue->desc[at];

		desc->addr = buffers[i].addr;
		desc->len = buffers[i].len;
		desc->flags = (uint16_t)((buffers[i].device_writes ? VRING_DESC_WRITE : 0) |
					 (i + 1 == count ? 0 : VRING_DESC_NEXT));
		at = queue->next[at];
		desc->next = i + 1 == count ? 0 : at;
	}
	return at;
}

int front_queue_add(struct front_queue *queue, const struct front_buffer *buffers, uint32_t count, void *table,
		    uint64_t table_addr)
{
	uint16_t head = queue->free_head;
	uint32_t taken = table ? 1 : count;

	if (count == 0 || count > VQ_MAX_SIZE) {
		return -EINVAL;
	}
	if (taken > queue->free_count) {
		return -ENOSPC;
	}
	if (queue->packed) {
		return front_packed_add(queue, buffers, count, table, table_addr);
	}
	if (table) {
		fill_table(table, buffers, count);
		queue->desc[head] = (struct vring_desc){
		    .addr = table_addr, .len = count * sizeof(struct vring_desc), .flags = VRING_DESC_INDIRECT};
		queue->free_head = queue->next[head];
	} else {
		queue->free_head = fill_ring(queue, buffers, count);
	}
	queue->free_count = (uint16_t)(queue->free_count - taken);
	queue->chains[head] = (uint16_t)taken;
	queue->pending++;
	queue->avail->ring[queue->avail_idx++ & queue->mask] = head;
	return head;
}

void front_queue_add_head(struct front_queue *queue, uint16_t head)
{
	if (head < queue->size && queue->chains[head] == FRONT_NO_CHAIN) {
		queue->chains[head] = FRONT_RAW_CHAIN;
		queue->pending++;
	}
	queue->avail->ring[queue->avail_idx++ & queue->mask] = head;
}

int front_queue_kick(struct front_queue *queue)
{
	static const uint64_t one = 1;

	queue->kicks++;
	if (write(queue->kick_fd, &one, sizeof(one)) == sizeof(one) || errno == EAGAIN) {
		return 0; /* EAGAIN: the counter is full, so the device has a kick to see */
	}
	return -errno;
}

/* Publish what was added; whether the device asks for a kick. */
static bool split_publish(struct front_queue *queue)
{
	uint16_t old = queue->published;
	uint16_t new = queue->avail_idx;

	if (old == new) {
		return false;
	}
	front_store_release(&queue->avail->idx, new);
	queue->published = new;
	/* The device must see the index before we see whether it wants a kick: section 2.7.13.3. */
	atomic_thread_fence(memory_order_seq_cst);
	if (queue->event_idx) {
		uint16_t event = front_load_acquire(front_avail_event(queue));

		return (uint16_t)(new - event - 1) < (uint16_t)(new - old);
	}
	return !(front_load_acquire(&queue->used->flags) & VRING_USED_NO_NOTIFY);
}

int front_queue_publish(struct front_queue *queue)
{
	bool wanted = queue->packed ? front_packed_publish(queue) : split_publish(queue);

	return wanted ? front_queue_kick(queue) : 0;
}

/* Give the descriptors of a chain back to the free list. */
static void release(struct front_queue *queue, uint16_t head)
{
	uint16_t count = queue->chains[head];
	uint16_t last = head;

	queue->chains[head] = FRONT_NO_CHAIN;
	queue->pending--;
	if (count == FRONT_RAW_CHAIN) {
		return; /* its descriptors never came from the free list */
	}
	for (uint16_t i = 1; i < count; i++) {
		last = queue->next[last];
	}
	queue->next[last] = queue->free_head;
	queue->free_head = head;
	queue->free_count = (uint16_t)(queue->free_count + count);
}

static int split_reap(struct front_queue *queue, struct front_used *used, uint32_t max)
{
	uint16_t ready = front_queue_ready(queue);
	uint32_t n;

	if (ready > queue->pending) {
		return -EPROTO;
	}
	for (n = 0; n < ready && n < max; n++) {
		struct vring_used_elem elem = queue->used->ring[queue->used_idx & queue->mask];

		if (elem.id >= queue->size || queue->chains[elem.id] == FRONT_NO_CHAIN) {
			return -EPROTO;
		}
		release(queue, (uint16_t)elem.id);
		queue->used_idx++;
		used[n] = (struct front_used){.head = elem.id, .written = elem.len};
	}
	return (int)n;
}

int front_queue_reap(struct front_queue *queue, struct front_used *used, uint32_t max)
{
	return queue->packed ? front_packed_reap(queue, used, max) : split_reap(queue, used, max);
}

void front_queue_want_call(struct front_queue *queue, bool want)
{
	if (queue->packed) {
		front_packed_want_call(queue, want);
	} else if (queue->event_idx) {
		/* An index that has passed is 65535 entries away from being reached again. */
		front_store_release(front_used_event(queue), (uint16_t)(queue->used_idx - (want ? 0 : 1)));
	} else {
		front_store_release(&queue->avail->flags, want ? 0 : VRING_AVAIL_NO_INTERRUPT);
	}
	if (want) {
		atomic_thread_fence(memory_order_seq_cst);
	}
}

void front_queue_drain_call(struct front_queue *queue)
{
	uint64_t count;

	(void)!read(queue->call_fd, &count, sizeof(count));
}

int front_queue_wait(struct front_queue *queue, uint64_t timeout_ns, uint64_t spin_ns)
{
	struct pollfd call = {.fd = queue->call_fd, .events = POLLIN};
	uint64_t start = ticks_ns();
	uint64_t now = start;
	int rc = 0;

	while (now - start < spin_ns && now - start < timeout_ns) {
		for (int i = 0; i < 64; i++) {
			if (front_queue_ready(queue)) {
				return 1;
			}
			cpu_relax();
		}
		now = ticks_ns();
	}
	front_queue_want_call(queue, true);
	while (!front_queue_ready(queue) && now - start < timeout_ns) {
		uint64_t left = timeout_ns - (now - start);
		struct timespec limit = {.tv_sec = (time_t)(left / 1000000000),
					 .tv_nsec = (long)(left % 1000000000)};

		if (ppoll(&call, 1, &limit, NULL) < 0) {
			rc = -errno;
			break;
		}
		front_queue_drain_call(queue);
		now = ticks_ns();
	}
	front_queue_want_call(queue, false);
	return front_queue_ready(queue) ? 1 : rc;
}

uint32_t front_queue_free(const struct front_queue *queue)
{
	return queue->free_count;
}

uint32_t front_queue_pending(const struct front_queue *queue)
{
	return queue->pending;
}

uint64_t front_queue_kicks(const struct front_queue *queue)
{
	return queue->kicks;
}
