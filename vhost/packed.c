/*
 * Packed rings: virtio 1.2, section 2.8.
 *
 * Used descriptors overwrite available ones in the order of completion, so a chain must be kept elsewhere
 * from the moment it is taken: in entries (ours) and in the in-flight log (for whoever comes after us). Both
 * have the same numbers and the same free list; ours is what we believe, the log is only written. A slot is
 * the number of a chain's first entry.
 */
#include <errno.h>
#include <stdlib.h>

#include "vhost/dirty.h"
#include "vhost/ring.h"

#define BASE_INDEX 0x7fff /* of each half of a vring base; the bit above is the wrap counter */

static inline void advance(const struct virtqueue *vq, uint16_t *index, bool *wrap, uint16_t count)
{
	uint32_t next = (uint32_t)*index + count;

	if (next >= vq->size) {
		next -= vq->size;
		*wrap = !*wrap;
	}
	*index = (uint16_t)next;
}

/* --- the in-flight log ------------------------------------------------------------------------------ */

static void log_reset(struct virtqueue *vq)
{
	struct packed_ring *ring = &vq->packed;
	struct inflight_packed *log = ring->log;

	memset(log, 0, sizeof(*log) + vq->size * sizeof(log->desc[0]));
	log->version = INFLIGHT_VERSION;
	log->desc_num = vq->size;
	log->used_idx = log->old_used_idx = ring->used_idx;
	log->used_wrap_counter = log->old_used_wrap_counter = ring->used_wrap;
	for (uint32_t i = 0; i < vq->size; i++) {
		log->desc[i].next = ring->entries[i].next = (uint16_t)(i + 1);
	}
	ring->free_head = 0;
	ring->free_count = vq->size;
}

/* The chain of @first..@last is in the log; now it counts. */
static void log_take(struct virtqueue *vq, uint16_t first)
{
	struct packed_ring *ring = &vq->packed;
	struct inflight_packed_desc *entry = &ring->log->desc[first];

	entry->last = ring->entries[first].last;
	entry->num = ring->entries[first].num;
	entry->counter = vq->counter++;
	store8_release(&entry->inflight, 1);
	store16_release(&ring->log->free_head, ring->free_head);
	store16_release(&ring->log->old_free_head, ring->free_head);
}

static void log_save(struct virtqueue *vq, uint16_t place, const struct packed_entry *entry, uint16_t id)
{
	struct inflight_packed_desc *copy = &vq->packed.log->desc[place];

	copy->addr = entry->addr;
	copy->len = entry->len;
	copy->flags = entry->flags;
	copy->id = id;
}

/*
 * Undo what the process before us had begun to publish and not made visible: the first descriptor of a
 * batch is written last, so its flags tell (vhost-user specification, "When reconnecting"). The front-end
 * can write the log, too: what counts is a copy.
 */
static int log_settle(struct virtqueue *vq)
{
	struct packed_ring *ring = &vq->packed;
	struct inflight_packed *log = ring->log;
	struct inflight_packed copy;

	memcpy(&copy, (const void *)log, sizeof(copy));
	__atomic_signal_fence(__ATOMIC_SEQ_CST); /* no second look instead of the copy */
	if (copy.old_used_idx >= vq->size || copy.used_idx >= vq->size || copy.old_free_head > vq->size ||
	    copy.free_head > vq->size) {
		vq_break(vq, -EINVAL, "in-flight log: used_idx %u, free_head %u in a ring of %u", copy.used_idx,
			 copy.free_head, vq->size);
		return -EINVAL;
	}
	if (copy.used_idx != copy.old_used_idx) {
		uint16_t flags = load16_acquire(&ring->desc[copy.old_used_idx].flags);
		bool avail = flags & VRING_PACKED_AVAIL, used = flags & VRING_PACKED_USED;

		if (avail == used && used == !!copy.old_used_wrap_counter) {
			copy.old_free_head = copy.free_head;
			copy.old_used_idx = copy.used_idx;
			copy.old_used_wrap_counter = copy.used_wrap_counter;
		}
	}
	ring->free_head = log->free_head = log->old_free_head = copy.old_free_head;
	ring->used_idx = log->used_idx = log->old_used_idx = copy.old_used_idx;
	ring->used_wrap = copy.old_used_wrap_counter != 0;
	log->used_wrap_counter = log->old_used_wrap_counter = ring->used_wrap;
	return 0;
}

/*
 * An entry is free or belongs to one chain, or we would hand it out twice. 0, or -EINVAL if it was seen
 * before.
 */
static int see_entry(struct virtqueue *vq, uint16_t place, bool *seen)
{
	if (seen[place]) {
		vq_break(vq, -EINVAL, "in-flight log: entry %u is in a loop, or in two lists", place);
		return -EINVAL;
	}
	seen[place] = true;
	return 0;
}

/* Entries of the free list are in flight no more, whatever they say; a bad list is refused. */
static int log_read_free_list(struct virtqueue *vq, bool *seen)
{
	struct packed_ring *ring = &vq->packed;
	uint16_t place = ring->free_head;

	for (ring->free_count = 0; place < vq->size; ring->free_count++) {
		if (see_entry(vq, place, seen) < 0) {
			return -EINVAL;
		}
		ring->log->desc[place].inflight = 0;
		ring->entries[place].next = load16(&ring->log->desc[place].next);
		place = ring->entries[place].next;
	}
	return 0;
}

/* Copy a chain out of the log; the number of its descriptors or -EINVAL. */
static int log_read_chain(struct virtqueue *vq, uint16_t first, bool *seen)
{
	struct packed_ring *ring = &vq->packed;
	uint16_t num = load16(&ring->log->desc[first].num);
	uint16_t place = first;

	for (uint16_t i = 0; i < num && place < vq->size; i++) {
		const struct inflight_packed_desc *logged = &ring->log->desc[place];
		struct packed_entry *entry = &ring->entries[place];

		if (see_entry(vq, place, seen) < 0) {
			return -EINVAL;
		}
		entry->addr = logged->addr;
		entry->len = logged->len;
		entry->flags = logged->flags;
		entry->next = load16(&logged->next);
		ring->entries[first].last = place;
		ring->entries[first].id = logged->id;
		if (i + 1 == num) {
			ring->entries[first].num = num;
			return num;
		}
		place = entry->next;
	}
	vq_break(vq, -EINVAL, "in-flight log: chain of %u descriptors at entry %u in a ring of %u", num, first,
		 vq->size);
	return -EINVAL;
}

static int log_collect(struct virtqueue *vq, struct ring_in_flight *found, bool *seen)
{
	struct packed_ring *ring = &vq->packed;
	uint32_t count = 0, descs = 0;

	for (uint32_t i = 0; i < vq->size; i++) {
		int num;

		if (!__atomic_load_n(&ring->log->desc[i].inflight, __ATOMIC_ACQUIRE)) {
			continue;
		}
		num = log_read_chain(vq, (uint16_t)i, seen);
		if (num < 0) {
			return num;
		}
		descs += (uint32_t)num;
		found[count].slot = (uint16_t)i;
		found[count++].counter = ring->log->desc[i].counter;
	}
	if (descs + ring->free_count != vq->size) {
		vq_break(vq, -EINVAL, "in-flight log: %u descriptors in flight and %u free in a ring of %u",
			 descs, ring->free_count, vq->size);
		return -EINVAL;
	}
	ring->next_avail = ring->used_idx;
	ring->avail_wrap = ring->used_wrap;
	advance(vq, &ring->next_avail, &ring->avail_wrap, (uint16_t)descs);
	return ring_resubmit(vq, found, count);
}

static int log_recover(struct virtqueue *vq)
{
	struct ring_in_flight *found = calloc(vq->size, sizeof(*found));
	bool *seen = calloc(vq->size, sizeof(*seen));
	int rc = found != NULL && seen != NULL ? log_settle(vq) : -ENOMEM;

	if (rc == 0) {
		rc = log_read_free_list(vq, seen);
	}
	if (rc == 0) {
		rc = log_collect(vq, found, seen);
	}
	free(found);
	free(seen);
	return rc;
}

/* --- life ------------------------------------------------------------------------------------------- */

int packed_set_memory(struct virtqueue *vq, struct guest_memory *memory)
{
	void *desc, *driver, *device;
	int rc =
	    ring_find(memory, vq->desc_user, (uint64_t)vq->size * sizeof(struct vring_packed_desc), 16, &desc);

	if (rc == 0) {
		rc = ring_find(memory, vq->avail_user, sizeof(struct vring_packed_event), 4, &driver);
	}
	if (rc == 0) {
		rc = ring_find(memory, vq->used_user, sizeof(struct vring_packed_event), 4, &device);
	}
	if (rc < 0) {
		return rc;
	}
	vq->packed.desc = desc;
	vq->packed.driver_event = driver;
	vq->packed.device_event = device;
	return 0;
}

int packed_start(struct virtqueue *vq, uint32_t base, bool recover)
{
	struct packed_ring *ring = &vq->packed;

	ring->entries = calloc(vq->size, sizeof(*ring->entries));
	ring->done = calloc(vq->size, sizeof(*ring->done));
	if (ring->entries == NULL || ring->done == NULL) {
		return -ENOMEM;
	}
	ring->log = (struct inflight_packed *)vq->log_mapping.data;
	ring->next_avail = base & BASE_INDEX;
	ring->avail_wrap = base >> 15 & 1;
	ring->used_idx = base >> 16 & BASE_INDEX;
	ring->used_wrap = base >> 31;
	if (recover && ring->log->version != 0) {
		return log_recover(vq);
	}
	if (ring->next_avail >= vq->size || ring->used_idx >= vq->size) {
		return -EINVAL;
	}
	log_reset(vq);
	return 0;
}

void packed_free(struct virtqueue *vq)
{
	free(vq->packed.entries);
	free(vq->packed.done);
}

uint32_t packed_base(const struct virtqueue *vq)
{
	const struct packed_ring *ring = &vq->packed;

	return (uint32_t)ring->next_avail | (uint32_t)ring->avail_wrap << 15 | (uint32_t)ring->used_idx << 16 |
	       (uint32_t)ring->used_wrap << 31;
}

/* --- requests --------------------------------------------------------------------------------------- */

static inline bool is_avail(uint16_t flags, bool wrap)
{
	return !!(flags & VRING_PACKED_AVAIL) == wrap && !!(flags & VRING_PACKED_USED) != wrap;
}

/* Copy the chain at next_avail; the slot, or -1 after breaking the queue. */
static int take_chain(struct virtqueue *vq)
{
	struct packed_ring *ring = &vq->packed;
	uint16_t first = ring->free_head;
	uint16_t num = 0;

	for (;;) {
		struct desc_words words = load_desc_words(&ring->desc[ring->next_avail]);
		uint16_t place = ring->free_head;
		struct packed_entry *entry;

		if (unlikely(num == ring->free_count)) {
			vq_break(vq, -EINVAL, "packed ring: more than %u descriptors are in flight", vq->size);
			return -1;
		}
		entry = &ring->entries[place];
		entry->addr = words.addr;
		entry->len = (uint32_t)words.rest;
		entry->flags = (uint16_t)(words.rest >> 48);
		log_save(vq, place, entry, (uint16_t)(words.rest >> 32));
		ring->free_head = entry->next;
		num++;
		advance(vq, &ring->next_avail, &ring->avail_wrap, 1);
		if (!(entry->flags & VRING_DESC_NEXT)) {
			ring->entries[first].last = place;
			ring->entries[first].num = num;
			/* The identifier of a chain stands in its last descriptor: section 2.8.6. */
			ring->entries[first].id = (uint16_t)(words.rest >> 32);
			ring->free_count -= num;
			return first;
		}
	}
}

unsigned packed_take(struct virtqueue *vq, uint16_t *slots, unsigned max)
{
	struct packed_ring *ring = &vq->packed;
	unsigned n = 0;

	while (n < max && is_avail(load16_acquire(&ring->desc[ring->next_avail].flags), ring->avail_wrap)) {
		int slot = take_chain(vq);

		if (unlikely(slot < 0)) {
			break;
		}
		log_take(vq, (uint16_t)slot);
		slots[n++] = (uint16_t)slot;
	}
	return n;
}

static int read_indirect(struct virtqueue *vq, const struct packed_entry *entry, struct chain_builder *built)
{
	const struct vring_packed_desc *table;
	uint32_t count;
	int rc = ring_open_indirect(vq, entry->addr, entry->len, entry->flags, (const void **)&table, &count);

	/* The flags of a table's descriptors say nothing but WRITE: section 2.8.7. */
	for (uint32_t i = 0; rc == 0 && i < count; i++) {
		struct desc_words words = load_desc_words(&table[i]);

		rc = chain_add(built, vq, words.addr, (uint32_t)words.rest, (uint16_t)(words.rest >> 48));
	}
	return rc;
}

int packed_read_chain(struct virtqueue *vq, uint16_t slot, struct vq_chain *chain)
{
	const struct packed_entry *entries = vq->packed.entries;
	struct chain_builder built = chain_begin(vq, chain);
	uint16_t place = slot;
	int rc = 0;

	for (uint16_t i = 0; rc == 0 && i < entries[slot].num; i++) {
		const struct packed_entry *entry = &entries[place];

		if (!(entry->flags & VRING_DESC_INDIRECT)) {
			rc = chain_add(&built, vq, entry->addr, entry->len, entry->flags);
		} else if (entries[slot].num == 1) {
			rc = read_indirect(vq, entry, &built);
		} else {
			vq_break(vq, -EINVAL, "indirect descriptor inside a chain");
			rc = -EINVAL;
		}
		place = entry->next;
	}
	chain_end(&built, chain);
	return rc;
}

void packed_complete(struct virtqueue *vq, uint16_t slot, uint32_t written)
{
	struct packed_used *done = &vq->packed.done[vq->packed.done_count++];

	done->slot = slot;
	done->written = written;
}

static uint16_t used_flags(bool wrap, uint32_t written)
{
	uint16_t flags = wrap ? VRING_PACKED_AVAIL | VRING_PACKED_USED : 0;

	return written > 0 ? flags | VRING_DESC_WRITE : flags;
}

/* Put the chain of @slot at the front of the free list, ours and the log's. */
static void give_back(struct virtqueue *vq, uint16_t slot)
{
	struct packed_ring *ring = &vq->packed;
	uint16_t last = ring->entries[slot].last;

	ring->entries[last].next = ring->free_head;
	store16(&ring->log->desc[last].next, ring->free_head);
	ring->free_head = slot;
	ring->free_count += ring->entries[slot].num;
}

/* Whatever the log says of a chain in the free list, it is in flight no more: the list is made first. */
void packed_put_back(struct virtqueue *vq, uint16_t slot)
{
	struct packed_ring *ring = &vq->packed;
	uint16_t num = ring->entries[slot].num;

	give_back(vq, slot);
	store16_release(&ring->log->free_head, ring->free_head);
	store16_release(&ring->log->old_free_head, ring->free_head);
	store8_release(&ring->log->desc[slot].inflight, 0);
	if (ring->next_avail < num) {
		ring->next_avail = (uint16_t)(ring->next_avail + vq->size - num);
		ring->avail_wrap = !ring->avail_wrap;
	} else {
		ring->next_avail -= num;
	}
}

static void log_published(struct virtqueue *vq)
{
	struct packed_ring *ring = &vq->packed;

	for (uint16_t i = 0; i < ring->done_count; i++) {
		store8_release(&ring->log->desc[ring->done[i].slot].inflight, 0);
	}
	store16_release(&ring->log->old_free_head, ring->free_head);
	store16_release(&ring->log->old_used_idx, ring->used_idx);
	store8_release(&ring->log->old_used_wrap_counter, ring->used_wrap);
}

/*
 * Note in the dirty log the used descriptors of a batch that began at @first. The ring has no log address:
 * SET_VRING_ADDR gives only that of the device's event suppression.
 */
static void log_dirty(struct virtqueue *vq, uint16_t first)
{
	const struct packed_ring *ring = &vq->packed;
	bool wrap = false;

	for (uint16_t i = 0; i < ring->done_count; i++) {
		dirty_host(vq->memory, &ring->desc[first], sizeof(ring->desc[0]));
		advance(vq, &first, &wrap, ring->entries[ring->done[i].slot].num);
	}
}

/*
 * Write the used descriptors of a batch, the flags of the first one last: with them the driver sees all.
 */
uint32_t packed_publish(struct virtqueue *vq)
{
	struct packed_ring *ring = &vq->packed;
	uint16_t first = ring->used_idx;
	uint16_t count = ring->done_count;
	uint16_t first_flags = 0;

	if (count == 0) {
		return 0;
	}
	for (uint16_t i = 0; i < count; i++) {
		const struct packed_used *done = &ring->done[i];
		struct vring_packed_desc *desc = &ring->desc[ring->used_idx];
		uint16_t flags = used_flags(ring->used_wrap, done->written);

		desc->id = ring->entries[done->slot].id;
		desc->len = done->written;
		if (i == 0) {
			first_flags = flags;
		} else {
			store16_release(&desc->flags, flags);
		}
		advance(vq, &ring->used_idx, &ring->used_wrap, ring->entries[done->slot].num);
		give_back(vq, done->slot);
	}
	store16_release(&ring->log->free_head, ring->free_head);
	store16_release(&ring->log->used_idx, ring->used_idx);
	store8_release(&ring->log->used_wrap_counter, ring->used_wrap);
	store16_release(&ring->desc[first].flags, first_flags);
	if (unlikely(vq->log_used)) {
		log_dirty(vq, first);
	}
	log_published(vq);
	ring->done_count = 0;
	return count;
}

/* --- notifications ---------------------------------------------------------------------------------- */

/* Section 2.8.10: always, never, or when (old, new] reaches a place that the driver names. */
bool packed_wants_signal(const struct virtqueue *vq)
{
	const struct packed_ring *ring = &vq->packed;
	uint16_t old = ring->signalled_idx;
	uint16_t new = ring->used_idx;
	uint16_t flags = load16(&ring->driver_event->flags);
	uint16_t off_wrap = load16(&ring->driver_event->off_wrap);
	uint16_t event = off_wrap & BASE_INDEX;

	if (flags != VRING_EVENTS_DESC || !vq->event_idx) {
		return flags != VRING_EVENTS_DISABLE;
	}
	if (new <= old) {
		old -= vq->size;
	}
	if (ring->used_wrap != off_wrap >> 15) {
		event -= vq->size;
	}
	return (uint16_t)(new - event - 1) < (uint16_t)(new - old);
}

bool packed_is_empty(const struct virtqueue *vq)
{
	return !is_avail(load16_acquire(&vq->packed.desc[vq->packed.next_avail].flags), vq->packed.avail_wrap);
}

void packed_set_kicks(struct virtqueue *vq, bool on)
{
	uint16_t *flags = &vq->packed.device_event->flags;

	store16(flags, on ? VRING_EVENTS_ENABLE : VRING_EVENTS_DISABLE);
	if (unlikely(vq->log_used)) {
		dirty_guest(vq->memory, vq->used_log + offsetof(struct vring_packed_event, flags),
			    sizeof(*flags));
	}
}
