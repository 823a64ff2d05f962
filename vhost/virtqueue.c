#include "vhost/virtqueue.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define INFLIGHT_VERSION 1

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* --- memory shared with the driver: every access exactly once --------------------------------------- */

static inline uint16_t load16(const uint16_t *p)
{
	return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static inline uint16_t load16_acquire(const uint16_t *p)
{
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static inline void store16(uint16_t *p, uint16_t value)
{
	__atomic_store_n(p, value, __ATOMIC_RELAXED);
}

static inline void store16_release(uint16_t *p, uint16_t value)
{
	__atomic_store_n(p, value, __ATOMIC_RELEASE);
}

static inline struct vring_desc load_desc(const struct vring_desc *p)
{
	const volatile uint64_t *words = (const volatile uint64_t *)p;
	uint64_t low = words[0];
	uint64_t high = words[1];
	struct vring_desc desc = {
	    .addr = low,
	    .len = (uint32_t)high,
	    .flags = (uint16_t)(high >> 32),
	    .next = (uint16_t)(high >> 48),
	};

	return desc;
}

static uint16_t *used_event(struct virtqueue *vq)
{
	return &vq->avail->ring[vq->size];
}

static uint16_t *avail_event(struct virtqueue *vq)
{
	return (uint16_t *)&vq->used->ring[vq->size];
}

static void signal_fd(int fd)
{
	uint64_t one = 1;

	/* The descriptor is a non-blocking eventfd: EAGAIN means that it is signalled already. */
	if (fd >= 0 && write(fd, &one, sizeof(one)) < 0) {
		return;
	}
}

/* --- breaking --------------------------------------------------------------------------------------- */

void vq_break(struct virtqueue *vq, int code, const char *format, ...)
{
	char text[REACTOR_NOTICE_TEXT];
	va_list args;

	if (vq->broken) {
		return;
	}
	vq->broken = true;
	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	reactor_notify(vq->reactor, vq->id, NOTICE_BROKEN, code, "%s", text);
	signal_fd(vq->error_fd);
}

/* --- the in-flight log ------------------------------------------------------------------------------ */

uint64_t vq_inflight_size(uint32_t size)
{
	return sizeof(struct inflight_queue) + (uint64_t)size * sizeof(struct inflight_desc);
}

static void log_reset(struct virtqueue *vq)
{
	memset(vq->log, 0, vq_inflight_size(vq->size));
	vq->log->version = INFLIGHT_VERSION;
	vq->log->desc_num = vq->size;
	vq->log->used_idx = vq->used_idx;
}

static inline void log_take(struct virtqueue *vq, uint16_t head)
{
	struct inflight_desc *entry = &vq->log->desc[head];

	entry->counter = vq->counter++;
	/* The counter is in place before the entry counts: a reader is another process. */
	__atomic_store_n(&entry->inflight, 1, __ATOMIC_RELEASE);
}

static inline void log_complete(struct virtqueue *vq, uint16_t head)
{
	vq->log->desc[head].next = vq->batch_head;
	vq->batch_head = head;
	__atomic_store_n(&vq->log->last_batch_head, head, __ATOMIC_RELEASE);
}

static void log_published(struct virtqueue *vq, uint16_t count)
{
	for (uint16_t i = 0; i < count; i++) {
		__atomic_store_n(&vq->log->desc[vq->done[i]].inflight, 0, __ATOMIC_RELEASE);
	}
	__atomic_store_n(&vq->log->used_idx, vq->used_idx, __ATOMIC_RELEASE);
}

/*
 * The process before us may have been killed between publishing a batch and clearing it in the log: then
 * the log's used_idx lags behind the ring's, and the batch is the list that begins at last_batch_head.
 */
static int log_settle(struct virtqueue *vq)
{
	uint16_t head = load16(&vq->log->last_batch_head);
	uint16_t batch = (uint16_t)(vq->used_idx - load16(&vq->log->used_idx));

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
		vq->log->desc[head].inflight = 0;
		head = load16(&vq->log->desc[head].next);
	}
	vq->log->used_idx = vq->used_idx;
	return 0;
}

struct in_flight_head {
	uint64_t counter;
	uint16_t head;
};

static int by_counter(const void *a, const void *b)
{
	const struct in_flight_head *x = a, *y = b;

	return x->counter < y->counter ? -1 : x->counter > y->counter;
}

static uint32_t log_collect(struct virtqueue *vq, struct in_flight_head *heads)
{
	uint32_t count = 0;

	for (uint32_t i = 0; i < vq->size; i++) {
		if (__atomic_load_n(&vq->log->desc[i].inflight, __ATOMIC_ACQUIRE)) {
			heads[count].head = (uint16_t)i;
			heads[count].counter = vq->log->desc[i].counter;
			count++;
		}
	}
	qsort(heads, count, sizeof(*heads), by_counter);
	return count;
}

/* Find out what was in flight, and that it is to be served again in its original order. */
static int log_recover(struct virtqueue *vq)
{
	struct in_flight_head *heads;
	int rc;

	if (vq->log->version == 0) {
		log_reset(vq); /* nobody has used it yet */
		return 0;
	}
	if (vq->log->version != INFLIGHT_VERSION || vq->log->desc_num != vq->size) {
		vq_break(vq, -EINVAL, "in-flight log: version %u for %u entries, expected version %u for %u",
			 vq->log->version, vq->log->desc_num, INFLIGHT_VERSION, vq->size);
		return -EINVAL;
	}
	rc = log_settle(vq);
	if (rc < 0) {
		return rc;
	}
	heads = calloc(vq->size, sizeof(*heads));
	vq->resubmit = calloc(vq->size, sizeof(*vq->resubmit));
	if (heads == NULL || vq->resubmit == NULL) {
		free(heads);
		return -ENOMEM;
	}
	vq->resubmit_count = log_collect(vq, heads);
	for (uint32_t i = 0; i < vq->resubmit_count; i++) {
		vq->resubmit[i] = heads[i].head;
		vq->counter = heads[i].counter + 1;
	}
	vq->next_avail = (uint16_t)(vq->used_idx + vq->resubmit_count);
	free(heads);
	return 0;
}

/* --- starting and stopping -------------------------------------------------------------------------- */

struct ring_addresses {
	void *desc;
	void *avail;
	void *used;
};

static int find_ring(struct guest_memory *memory, uint64_t user, uint64_t size, uint64_t alignment, void **ring)
{
	*ring = guest_memory_at_user(memory, user, size);
	if (*ring == NULL) {
		return -EFAULT;
	}
	return (uintptr_t)*ring % alignment == 0 ? 0 : -EINVAL;
}

static int find_rings(struct virtqueue *vq, struct guest_memory *memory, struct ring_addresses *rings)
{
	uint64_t size = vq->size;
	int rc = find_ring(memory, vq->desc_user, size * sizeof(struct vring_desc), 16, &rings->desc);

	if (rc == 0) {
		rc = find_ring(memory, vq->avail_user, 6 + size * 2, 2, &rings->avail);
	}
	if (rc == 0) {
		rc = find_ring(memory, vq->used_user, 6 + size * sizeof(struct vring_used_elem), 4,
			       &rings->used);
	}
	return rc;
}

int vq_set_memory(struct virtqueue *vq, struct guest_memory *memory)
{
	struct ring_addresses rings;
	int rc = find_rings(vq, memory, &rings);

	if (rc < 0) {
		reactor_notify(vq->reactor, vq->id, NOTICE_LOG, rc,
			       "rings at %#" PRIx64 ", %#" PRIx64 ", %#" PRIx64
			       " are misaligned or outside of guest memory",
			       vq->desc_user, vq->avail_user, vq->used_user);
		return rc;
	}
	vq->desc = rings.desc;
	vq->avail = rings.avail;
	vq->used = rings.used;
	guest_memory_get(memory);
	if (vq->memory != NULL) {
		guest_memory_put(vq->memory);
	}
	vq->memory = memory;
	return 0;
}

static int take_fd(int fd, int *own)
{
	*own = -1;
	if (fd < 0) {
		return 0;
	}
	*own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	return *own < 0 ? -errno : 0;
}

static int take_fds(struct virtqueue *vq, const struct vq_setup *setup)
{
	int rc = take_fd(setup->kick_fd, &vq->kick_fd);

	if (rc == 0) {
		rc = take_fd(setup->call_fd, &vq->call_fd);
	}
	if (rc == 0) {
		rc = take_fd(setup->error_fd, &vq->error_fd);
	}
	return rc;
}

static int start_log(struct virtqueue *vq, const struct vq_setup *setup)
{
	int rc;

	if (setup->inflight_size < vq_inflight_size(vq->size)) {
		return -EINVAL;
	}
	rc = mapping_create(&vq->log_mapping, setup->inflight_fd, setup->inflight_offset, setup->inflight_size,
			    &vq->lost);
	if (rc < 0) {
		return rc;
	}
	vq->log = (struct inflight_queue *)vq->log_mapping.data;
	if ((uintptr_t)vq->log % _Alignof(struct inflight_queue) != 0) {
		return -EINVAL;
	}
	if (setup->recover) {
		return log_recover(vq);
	}
	log_reset(vq);
	return 0;
}

static int start(struct virtqueue *vq, struct guest_memory *memory, const struct vq_setup *setup)
{
	int rc;

	if (setup->size == 0 || setup->size > VQ_MAX_SIZE || (setup->size & (setup->size - 1)) != 0) {
		return -EINVAL;
	}
	vq->size = (uint16_t)setup->size;
	vq->mask = (uint16_t)(setup->size - 1);
	vq->desc_user = setup->desc;
	vq->avail_user = setup->avail;
	vq->used_user = setup->used;
	vq->event_idx = setup->features >> VIRTIO_F_EVENT_IDX & 1;
	vq->indirect = setup->features >> VIRTIO_F_INDIRECT_DESC & 1;
	vq->taken = calloc(vq->size, sizeof(*vq->taken));
	vq->done = calloc(vq->size, sizeof(*vq->done));
	if (vq->taken == NULL || vq->done == NULL) {
		return -ENOMEM;
	}
	rc = take_fds(vq, setup);
	if (rc == 0) {
		rc = vq_set_memory(vq, memory);
	}
	if (rc < 0) {
		return rc;
	}
	vq->next_avail = (uint16_t)setup->base;
	vq->used_idx = vq->published_idx = load16(&vq->used->idx);
	return start_log(vq, setup);
}

int vq_start(struct virtqueue *vq, struct reactor *reactor, struct guest_memory *memory,
	     const struct vq_setup *setup)
{
	int rc;

	memset(vq, 0, sizeof(*vq));
	vq->reactor = reactor;
	vq->id = setup->id;
	vq->kick_fd = vq->call_fd = vq->error_fd = -1;
	rc = start(vq, memory, setup);
	if (rc < 0) {
		vq_stop(vq);
		return rc;
	}
	vq_unwait(vq);
	if (setup->recover) {
		/* Whoever published last may have been killed before it could signal. */
		signal_fd(vq->call_fd);
	}
	return 0;
}

static void close_fd(int *fd)
{
	if (*fd >= 0) {
		close(*fd);
	}
	*fd = -1;
}

void vq_stop(struct virtqueue *vq)
{
	close_fd(&vq->kick_fd);
	close_fd(&vq->call_fd);
	close_fd(&vq->error_fd);
	mapping_destroy(&vq->log_mapping);
	if (vq->memory != NULL) {
		guest_memory_put(vq->memory);
		vq->memory = NULL;
	}
	free(vq->taken);
	free(vq->done);
	free(vq->resubmit);
	vq->taken = NULL;
	vq->done = NULL;
	vq->resubmit = NULL;
}

/* --- taking ----------------------------------------------------------------------------------------- */

static inline bool mark_taken(struct virtqueue *vq, uint16_t head)
{
	if (unlikely(head >= vq->size)) {
		vq_break(vq, -EINVAL, "avail ring: head %u in a ring of %u", head, vq->size);
		return false;
	}
	if (unlikely(vq->taken[head])) {
		vq_break(vq, -EINVAL, "avail ring: head %u is in flight already", head);
		return false;
	}
	vq->taken[head] = 1;
	return true;
}

static unsigned take_again(struct virtqueue *vq, uint16_t *heads, unsigned max)
{
	unsigned n = 0;

	while (n < max && vq->resubmit_next < vq->resubmit_count) {
		heads[n] = vq->resubmit[vq->resubmit_next++];
		mark_taken(vq, heads[n++]);
	}
	if (vq->resubmit_next == vq->resubmit_count) {
		free(vq->resubmit);
		vq->resubmit = NULL;
	}
	return n;
}

static bool has_lost_memory(struct virtqueue *vq)
{
	if (likely(!guest_memory_lost(vq->memory) && !vq->lost)) {
		return false;
	}
	vq_break(vq, -EFAULT, "the file behind %s was truncated while in use",
		 vq->lost ? "the in-flight log" : "guest memory");
	return true;
}

unsigned vq_take(struct virtqueue *vq, uint16_t *heads, unsigned max)
{
	uint16_t waiting;
	unsigned n;

	if (unlikely(vq->broken || has_lost_memory(vq))) {
		return 0;
	}
	if (unlikely(vq->resubmit != NULL)) {
		return take_again(vq, heads, max);
	}
	waiting = (uint16_t)(load16_acquire(&vq->avail->idx) - vq->next_avail);
	if (waiting == 0) {
		return 0;
	}
	if (unlikely(waiting > vq->size)) {
		vq_break(vq, -EINVAL, "avail ring: idx is %u ahead in a ring of %u", waiting, vq->size);
		return 0;
	}
	for (n = 0; n < max && n < waiting; n++) {
		uint16_t head = load16(&vq->avail->ring[vq->next_avail & vq->mask]);

		if (!mark_taken(vq, head)) {
			break;
		}
		__builtin_prefetch(&vq->desc[head]);
		log_take(vq, head);
		heads[n] = head;
		vq->next_avail++;
	}
	return n;
}

/* --- reading chains --------------------------------------------------------------------------------- */

struct desc_table {
	const struct vring_desc *desc;
	uint32_t size;
};

static int open_indirect(struct virtqueue *vq, const struct vring_desc *desc, struct desc_table *table)
{
	if (!vq->indirect) {
		vq_break(vq, -EINVAL, "indirect descriptor, which was not negotiated");
		return -EINVAL;
	}
	if (desc->flags & VRING_DESC_NEXT || desc->len == 0 || desc->len % sizeof(struct vring_desc) != 0) {
		vq_break(vq, -EINVAL, "indirect table of %u bytes, flags %#x", desc->len, desc->flags);
		return -EINVAL;
	}
	table->size = desc->len / sizeof(struct vring_desc);
	table->desc = guest_memory_at(vq->memory, desc->addr, desc->len);
	if (table->desc == NULL) {
		vq_break(vq, -EFAULT, "indirect table at %#" PRIx64 ", %u bytes: outside of guest memory",
			 desc->addr, desc->len);
		return -EFAULT;
	}
	return 0;
}

/* Add one buffer to the chain. */
static int add_buffer(struct virtqueue *vq, struct vq_chain *chain, const struct vring_desc *desc)
{
	uint32_t used = chain->readable + chain->writable;
	void *host = guest_memory_at(vq->memory, desc->addr, desc->len);
	int n = 1;

	if (likely(host != NULL && used < chain->room)) {
		chain->iov[used].iov_base = host;
		chain->iov[used].iov_len = desc->len;
	} else {
		n = guest_memory_iov(vq->memory, desc->addr, desc->len, &chain->iov[used], chain->room - used);
	}
	if (unlikely(n < 0)) {
		if (n == -ENOBUFS && chain->room < VQ_MAX_SEGMENTS) {
			return n;
		}
		vq_break(vq, n,
			 n == -ENOBUFS ? "buffer at %#" PRIx64 ", %u bytes: chain is too long"
				       : "buffer at %#" PRIx64 ", %u bytes: outside of guest memory",
			 desc->addr, desc->len);
		return n;
	}
	if (desc->flags & VRING_DESC_WRITE) {
		chain->writable += (uint32_t)n;
		chain->writable_bytes += desc->len;
	} else {
		if (unlikely(chain->writable > 0)) {
			vq_break(vq, -EINVAL, "readable buffer at %#" PRIx64 " follows a writable one",
				 desc->addr);
			return -EINVAL;
		}
		chain->readable += (uint32_t)n;
		chain->readable_bytes += desc->len;
	}
	return 0;
}

int vq_read_chain(struct virtqueue *vq, uint16_t head, struct vq_chain *chain)
{
	struct desc_table table = {.desc = vq->desc, .size = vq->size};
	struct vring_desc desc = load_desc(&vq->desc[head]);
	int rc;

	chain->readable = chain->writable = 0;
	chain->readable_bytes = chain->writable_bytes = 0;
	if (desc.flags & VRING_DESC_INDIRECT) {
		rc = open_indirect(vq, &desc, &table);
		if (rc < 0) {
			return rc;
		}
		desc = load_desc(&table.desc[0]);
	}
	for (uint32_t seen = 1;; seen++) {
		if (unlikely(desc.flags & VRING_DESC_INDIRECT)) {
			vq_break(vq, -EINVAL, "indirect descriptor inside a chain");
			return -EINVAL;
		}
		rc = add_buffer(vq, chain, &desc);
		if (unlikely(rc < 0)) {
			return rc;
		}
		if (!(desc.flags & VRING_DESC_NEXT)) {
			return 0;
		}
		if (unlikely(desc.next >= table.size || seen == table.size)) {
			vq_break(vq, -EINVAL, "chain of head %u: %s (next is %u, table has %u)", head,
				 seen == table.size ? "loop" : "next is past the table", desc.next, table.size);
			return -EINVAL;
		}
		desc = load_desc(&table.desc[desc.next]);
	}
}

/* --- completing ------------------------------------------------------------------------------------- */

void vq_complete(struct virtqueue *vq, uint16_t head, uint32_t written)
{
	struct vring_used_elem *elem = &vq->used->ring[vq->used_idx & vq->mask];

	elem->id = head;
	elem->len = written;
	vq->done[(uint16_t)(vq->used_idx - vq->published_idx)] = head;
	vq->taken[head] = 0;
	vq->used_idx++;
	log_complete(vq, head);
}

/* Does the driver want to hear of what was published just now? (virtio 1.2, section 2.7.7) */
static bool wants_signal(struct virtqueue *vq)
{
	uint16_t old = vq->signalled_idx;
	bool valid = vq->signalled_valid;

	if (!vq->event_idx) {
		return !(load16(&vq->avail->flags) & VRING_AVAIL_NO_INTERRUPT);
	}
	vq->signalled_idx = vq->used_idx;
	vq->signalled_valid = true;
	return !valid || (uint16_t)(vq->used_idx - load16(used_event(vq)) - 1) < (uint16_t)(vq->used_idx - old);
}

void vq_publish(struct virtqueue *vq)
{
	uint16_t count = (uint16_t)(vq->used_idx - vq->published_idx);

	if (count == 0 || vq->broken) {
		return;
	}
	store16_release(&vq->used->idx, vq->used_idx);
	log_published(vq, count);
	vq->published_idx = vq->used_idx;
	/* The driver must see the new idx, or we what it asked for: section 2.7.7.2. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (wants_signal(vq)) {
		vq->calls++;
		signal_fd(vq->call_fd);
	}
}

/* --- kicks ------------------------------------------------------------------------------------------ */

bool vq_wait(struct virtqueue *vq)
{
	if (vq->broken) {
		return false;
	}
	if (vq->event_idx) {
		store16(avail_event(vq), vq->next_avail);
	} else {
		store16(&vq->used->flags, 0);
	}
	/* The driver must see that we want kicks, or we its new entries: section 2.7.10.1. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return load16(&vq->avail->idx) != vq->next_avail || vq->resubmit != NULL;
}

void vq_unwait(struct virtqueue *vq)
{
	/* With EVENT_IDX the event stays where it is: behind, where no new entry reaches it. */
	if (!vq->event_idx) {
		store16(&vq->used->flags, VRING_USED_NO_NOTIFY);
	}
}
