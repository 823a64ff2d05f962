/* Split rings: virtio 1.2, section 2.7. */
#include <errno.h>
#include <stdlib.h>

#include "vhost/dirty.h"
#include "vhost/ring.h"

static uint16_t *used_event(const struct virtqueue *vq)
{
	return &vq->split.avail->ring[vq->size];
}

static uint16_t *avail_event(const struct virtqueue *vq)
{
	return (uint16_t *)&vq->split.used->ring[vq->size];
}

/* --- the in-flight log ------------------------------------------------------------------------------ */

static void log_reset(struct virtqueue *vq)
{
	struct inflight_split *log = vq->split.log;

	memset(log, 0, sizeof(*log) + vq->size * sizeof(log->desc[0]));
	log->version = INFLIGHT_VERSION;
	log->desc_num = vq->size;
	log->used_idx = vq->split.used_idx;
}

static inline void log_take(struct virtqueue *vq, uint16_t head)
{
	struct inflight_split_desc *entry = &vq->split.log->desc[head];

	entry->counter = vq->counter++;
	/* The counter is in place before the entry counts: whoever reads this is another process. */
	store8_release(&entry->inflight, 1);
}

static inline void log_complete(struct virtqueue *vq, uint16_t head)
{
	vq->split.log->desc[head].next = vq->split.batch_head;
	vq->split.batch_head = head;
	store16_release(&vq->split.log->last_batch_head, head);
}

static void log_published(struct virtqueue *vq, uint16_t count)
{
	for (uint16_t i = 0; i < count; i++) {
		store8_release(&vq->split.log->desc[vq->split.done[i]].inflight, 0);
	}
	store16_release(&vq->split.log->used_idx, vq->split.used_idx);
}

/*
 * The process before us may have been killed between publishing a batch and clearing it in the log: then
 * the log's used_idx lags behind the ring's, and the batch is the list that begins at last_batch_head.
 */
static int log_settle(struct virtqueue *vq)
{
	struct inflight_split *log = vq->split.log;
	uint16_t head = load16(&log->last_batch_head);
	uint16_t batch = (uint16_t)(vq->split.used_idx - load16(&log->used_idx));

	if (batch > vq->size) {
		vq_break(vq, -EINVAL, "in-flight log: used_idx is %u entries behind a ring of %u", batch,
			 vq->size);
		return -EINVAL;
	}
	for (; batch > 0; batch--) {
		if (head >= vq->size) {
			vq_break(vq, -EINVAL, "in-flight log: head %u in a ring of %u", head, vq->size);
			return -EINVAL;
		}
		log->desc[head].inflight = 0;
		head = load16(&log->desc[head].next);
	}
	log->used_idx = vq->split.used_idx;
	return 0;
}

/* Find out what was in flight, and that it is to be served again in its original order. */
static int log_recover(struct virtqueue *vq)
{
	struct inflight_split *log = vq->split.log;
	struct ring_in_flight *found = calloc(vq->size, sizeof(*found));
	uint32_t count = 0;
	int rc;

	if (found == NULL) {
		return -ENOMEM;
	}
	rc = log_settle(vq);
	for (uint32_t head = 0; rc == 0 && head < vq->size; head++) {
		if (__atomic_load_n(&log->desc[head].inflight, __ATOMIC_ACQUIRE)) {
			found[count].slot = (uint16_t)head;
			found[count++].counter = log->desc[head].counter;
		}
	}
	if (rc == 0) {
		rc = ring_resubmit(vq, found, count);
		vq->split.next_avail = (uint16_t)(vq->split.used_idx + count);
	}
	free(found);
	return rc;
}

/* --- life ------------------------------------------------------------------------------------------- */

int split_set_memory(struct virtqueue *vq, struct guest_memory *memory)
{
	uint64_t size = vq->size;
	void *desc, *avail, *used;
	int rc = ring_find(memory, vq->desc_user, size * sizeof(struct vring_desc), 16, &desc);

	if (rc == 0) {
		rc = ring_find(memory, vq->avail_user, 6 + size * 2, 2, &avail);
	}
	if (rc == 0) {
		rc = ring_find(memory, vq->used_user, 6 + size * sizeof(struct vring_used_elem), 4, &used);
	}
	if (rc < 0) {
		return rc;
	}
	vq->split.desc = desc;
	vq->split.avail = avail;
	vq->split.used = used;
	return 0;
}

int split_start(struct virtqueue *vq, uint32_t base, bool recover)
{
	struct split_ring *ring = &vq->split;

	if ((vq->size & (vq->size - 1)) != 0) {
		return -EINVAL;
	}
	ring->mask = vq->size - 1;
	ring->taken = calloc(vq->size, sizeof(*ring->taken));
	ring->done = calloc(vq->size, sizeof(*ring->done));
	if (ring->taken == NULL || ring->done == NULL) {
		return -ENOMEM;
	}
	ring->log = (struct inflight_split *)vq->log_mapping.data;
	ring->next_avail = (uint16_t)base;
	ring->used_idx = ring->published_idx = load16(&ring->used->idx);
	if (recover && ring->log->version != 0) {
		return log_recover(vq);
	}
	log_reset(vq);
	return 0;
}

void split_free(struct virtqueue *vq)
{
	free(vq->split.taken);
	free(vq->split.done);
}

uint32_t split_base(const struct virtqueue *vq)
{
	return vq->split.next_avail;
}

/* --- requests --------------------------------------------------------------------------------------- */

static inline bool mark_taken(struct virtqueue *vq, uint16_t head)
{
	if (unlikely(head >= vq->size)) {
		vq_break(vq, -EINVAL, "avail ring: head %u in a ring of %u", head, vq->size);
		return false;
	}
	if (unlikely(vq->split.taken[head])) {
		vq_break(vq, -EINVAL, "avail ring: head %u is in flight already", head);
		return false;
	}
	vq->split.taken[head] = 1;
	return true;
}

void split_take_again(struct virtqueue *vq, uint16_t slot)
{
	vq->split.taken[slot] = 1;
}

void split_put_back_again(struct virtqueue *vq, uint16_t slot)
{
	vq->split.taken[slot] = 0;
}

void split_put_back(struct virtqueue *vq, uint16_t slot)
{
	store8_release(&vq->split.log->desc[slot].inflight, 0);
	vq->split.taken[slot] = 0;
	vq->split.next_avail--;
}

unsigned split_take(struct virtqueue *vq, uint16_t *slots, unsigned max)
{
	struct split_ring *ring = &vq->split;
	uint16_t waiting = (uint16_t)(load16_acquire(&ring->avail->idx) - ring->next_avail);
	unsigned n;

	if (unlikely(waiting > vq->size)) {
		vq_break(vq, -EINVAL, "avail ring: idx is %u ahead in a ring of %u", waiting, vq->size);
		return 0;
	}
	for (n = 0; n < max && n < waiting; n++) {
		uint16_t head = load16(&ring->avail->ring[ring->next_avail & ring->mask]);

		if (!mark_taken(vq, head)) {
			break;
		}
		__builtin_prefetch(&ring->desc[head]);
		log_take(vq, head);
		slots[n] = head;
		ring->next_avail++;
	}
	return n;
}

struct split_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags;
	uint16_t next;
};

static inline struct split_desc load_desc(const struct vring_desc *desc)
{
	struct desc_words words = load_desc_words(desc);
	struct split_desc copy = {
	    .addr = words.addr,
	    .len = (uint32_t)words.rest,
	    .flags = (uint16_t)(words.rest >> 32),
	    .next = (uint16_t)(words.rest >> 48),
	};

	return copy;
}

int split_read_chain(struct virtqueue *vq, uint16_t slot, struct vq_chain *chain)
{
	const struct vring_desc *table = vq->split.desc;
	struct split_desc desc = load_desc(&table[slot]);
	struct chain_builder built = chain_begin(vq, chain);
	uint32_t count = vq->size;
	int rc;

	if (desc.flags & VRING_DESC_INDIRECT) {
		rc = ring_open_indirect(vq, desc.addr, desc.len, desc.flags, (const void **)&table, &count);
		if (rc < 0) {
			return rc;
		}
		desc = load_desc(&table[0]);
	}
	for (uint32_t seen = 1;; seen++) {
		if (unlikely(desc.flags & VRING_DESC_INDIRECT)) {
			vq_break(vq, -EINVAL, "indirect descriptor inside a chain");
			return -EINVAL;
		}
		rc = chain_add(&built, vq, desc.addr, desc.len, desc.flags);
		if (unlikely(rc < 0)) {
			return rc;
		}
		if (!(desc.flags & VRING_DESC_NEXT)) {
			chain_end(&built, chain);
			return 0;
		}
		if (unlikely(desc.next >= count || seen == count)) {
			vq_break(vq, -EINVAL, "chain of head %u: %s (next is %u, table has %u)", slot,
				 seen == count ? "loop" : "next is past the table", desc.next, count);
			return -EINVAL;
		}
		desc = load_desc(&table[desc.next]);
	}
}

void split_complete(struct virtqueue *vq, uint16_t slot, uint32_t written)
{
	struct split_ring *ring = &vq->split;
	struct vring_used_elem *elem = &ring->used->ring[ring->used_idx & ring->mask];

	elem->id = slot;
	elem->len = written;
	ring->done[(uint16_t)(ring->used_idx - ring->published_idx)] = slot;
	ring->taken[slot] = 0;
	ring->used_idx++;
	log_complete(vq, slot);
}

/* Note in the dirty log what publishing @count entries has written into the used ring. */
static void log_dirty(struct virtqueue *vq, uint16_t count)
{
	const struct split_ring *ring = &vq->split;
	uint64_t elems = vq->used_log + offsetof(struct vring_used, ring);
	uint32_t first = ring->published_idx & ring->mask;
	uint32_t until_end = vq->size - first;
	uint32_t before = count < until_end ? count : until_end;

	dirty_guest(vq->memory, elems + first * sizeof(struct vring_used_elem),
		    before * sizeof(struct vring_used_elem));
	dirty_guest(vq->memory, elems, (count - before) * sizeof(struct vring_used_elem));
	dirty_guest(vq->memory, vq->used_log + offsetof(struct vring_used, idx), sizeof(ring->used->idx));
}

uint32_t split_publish(struct virtqueue *vq)
{
	struct split_ring *ring = &vq->split;
	uint16_t count = (uint16_t)(ring->used_idx - ring->published_idx);

	if (count == 0) {
		return 0;
	}
	store16_release(&ring->used->idx, ring->used_idx);
	if (unlikely(vq->log_used)) {
		log_dirty(vq, count);
	}
	log_published(vq, count);
	ring->published_idx = ring->used_idx;
	return count;
}

/* --- notifications ---------------------------------------------------------------------------------- */

/* Section 2.7.7: flags, or with EVENT_IDX an index that [old, new) reaches. */
bool split_wants_signal(const struct virtqueue *vq)
{
	uint16_t old = vq->split.signalled_idx;
	uint16_t new = vq->split.used_idx;

	if (!vq->event_idx) {
		return !(load16(&vq->split.avail->flags) & VRING_AVAIL_NO_INTERRUPT);
	}
	return (uint16_t)(new - load16(used_event(vq)) - 1) < (uint16_t)(new - old);
}

bool split_is_empty(const struct virtqueue *vq)
{
	return load16(&vq->split.avail->idx) == vq->split.next_avail;
}

void split_set_kicks(struct virtqueue *vq, bool on)
{
	uint16_t *field = vq->event_idx ? avail_event(vq) : &vq->split.used->flags;

	if (!vq->event_idx) {
		store16(field, on ? 0 : VRING_USED_NO_NOTIFY);
	} else {
		/* Switched off it stays behind, where no new entry reaches it. */
		store16(field, on ? vq->split.next_avail : (uint16_t)(vq->split.next_avail - 1));
	}
	if (unlikely(vq->log_used)) {
		dirty_guest(vq->memory, vq->used_log + (uint64_t)((char *)field - (char *)vq->split.used),
			    sizeof(*field));
	}
}
