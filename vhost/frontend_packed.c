/* The driver's side of a packed ring: virtio 1.2, section 2.8. */
#include "vhost/frontend.h"

#include <errno.h>

#define EVENT_PLACE 0x7fff /* of off_wrap; the bit above is the wrap counter */

static void fill_table(struct vring_packed_desc *table, const struct front_buffer *buffers, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		table[i] = (struct vring_packed_desc){.addr = buffers[i].addr,
						      .len = buffers[i].len,
						      .flags = buffers[i].device_writes ? VRING_DESC_WRITE : 0};
	}
}

int front_packed_add(struct front_queue *queue, const struct front_buffer *buffers, uint32_t count, void *table,
		     uint64_t table_addr)
{
	uint16_t taken = table ? 1 : (uint16_t)count;
	uint16_t id = queue->free_head;

	if (table) {
		fill_table(table, buffers, count);
		front_packed_put(queue, table_addr, count * sizeof(struct vring_packed_desc), id,
				 VRING_DESC_INDIRECT);
	} else {
		for (uint32_t i = 0; i < count; i++) {
			front_packed_put(queue, buffers[i].addr, buffers[i].len, id,
					 (uint16_t)((buffers[i].device_writes ? VRING_DESC_WRITE : 0) |
						    (i + 1 == count ? 0 : VRING_DESC_NEXT)));
		}
	}
	/* There are as many identifiers as descriptors, and no chain has less than one of each. */
	queue->free_head = queue->next[id];
	queue->free_count = (uint16_t)(queue->free_count - taken);
	queue->chains[id] = taken;
	queue->pending++;
	return id;
}

/* Does the device want to hear of the last @added descriptors? Section 2.8.10. */
static bool wants_kick(const struct front_queue *queue, uint16_t added)
{
	/* Place and flags belong together, so they are read together. */
	uint32_t raw = __atomic_load_n((const uint32_t *)queue->device_event, __ATOMIC_ACQUIRE);
	uint16_t off_wrap = (uint16_t)raw;
	uint16_t flags = (uint16_t)(raw >> 16);
	uint16_t event = off_wrap & EVENT_PLACE;
	uint16_t new = queue->avail_idx;

	if (flags != VRING_EVENTS_DESC || !queue->event_idx) {
		return flags != VRING_EVENTS_DISABLE;
	}
	if (queue->avail_wrap != off_wrap >> 15) {
		event = (uint16_t)(event - queue->size); /* of the lap before */
	}
	return (uint16_t)(new - event - 1) < added;
}

bool front_packed_publish(struct front_queue *queue)
{
	uint16_t added = queue->added;

	if (added == 0) {
		return false;
	}
	front_store_release(&queue->ring[queue->held_place].flags, queue->held_flags);
	queue->added = 0;
	/* The device must see the descriptors before we see whether it wants a kick: section 2.8.21. */
	atomic_thread_fence(memory_order_seq_cst);
	return wants_kick(queue, added);
}

int front_packed_reap(struct front_queue *queue, struct front_used *used, uint32_t max)
{
	uint32_t n;

	for (n = 0; n < max && front_packed_ready(queue); n++) {
		const struct vring_packed_desc *desc = &queue->ring[queue->used_idx];
		uint16_t id = __atomic_load_n(&desc->id, __ATOMIC_RELAXED);

		if (id >= queue->size || queue->chains[id] == FRONT_NO_CHAIN) {
			return -EPROTO;
		}
		used[n] = (struct front_used){.head = id, .written = desc->len};
		front_packed_advance(queue, &queue->used_idx, &queue->used_wrap, queue->chains[id]);
		queue->free_count = (uint16_t)(queue->free_count + queue->chains[id]);
		queue->chains[id] = FRONT_NO_CHAIN;
		queue->next[id] = queue->free_head;
		queue->free_head = id;
		queue->pending--;
	}
	return (int)n;
}

void front_packed_want_call(struct front_queue *queue, bool want)
{
	struct vring_packed_event *event = queue->driver_event;
	uint16_t flags = want ? VRING_EVENTS_ENABLE : VRING_EVENTS_DISABLE;

	if (want && queue->event_idx) {
		front_store_release(&event->off_wrap,
				    (uint16_t)(queue->used_idx | (uint32_t)queue->used_wrap << 15));
		flags = VRING_EVENTS_DESC;
	}
	front_store_release(&event->flags, flags);
}
