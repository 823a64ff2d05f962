#include "vhost/virtqueue.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "vhost/dirty.h"
#include "vhost/ring.h"

static bool has_feature(const struct vq_setup *setup, unsigned bit)
{
	return setup->features >> bit & 1;
}

static void signal_fd(int fd)
{
	uint64_t one = 1;

	/* The descriptor is a non-blocking eventfd: EAGAIN means that it is signalled already. */
	if (fd >= 0 && write(fd, &one, sizeof(one)) < 0) {
		return;
	}
}

static inline bool is_memory_lost(const struct virtqueue *vq)
{
	return vq->lost || (vq->memory != NULL && guest_memory_lost(vq->memory));
}

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
	if (is_memory_lost(vq)) {
		/* Whatever else is wrong: it was read from the zero pages that took the memory's place. */
		code = -EFAULT;
		snprintf(text, sizeof(text), "the file behind %s was truncated while in use",
			 vq->lost ? "the in-flight log" : "guest memory");
	}
	reactor_notify(vq->reactor, vq->id, NOTICE_BROKEN, code, "%s", text);
	signal_fd(vq->error_fd);
}

#define PACKED_BEGIN 0x80008000 /* the base of a packed ring that was never used: both wrap counters are 1 */

/* --- starting and stopping -------------------------------------------------------------------------- */

uint64_t vq_inflight_size(uint32_t size)
{
	return sizeof(struct inflight_packed) + (uint64_t)size * sizeof(struct inflight_packed_desc);
}

int ring_find(struct guest_memory *memory, uint64_t user, uint64_t size, uint64_t alignment, void *area)
{
	void *host = guest_memory_at_user(memory, user, size);

	if (host == NULL) {
		return -EFAULT;
	}
	memcpy(area, &host, sizeof(host));
	return (uintptr_t)host % alignment == 0 ? 0 : -EINVAL;
}

int vq_set_memory(struct virtqueue *vq, struct guest_memory *memory)
{
	int rc = vq->is_packed ? packed_set_memory(vq, memory) : split_set_memory(vq, memory);

	if (rc < 0) {
		reactor_notify(vq->reactor, vq->id, NOTICE_LOG, rc,
			       "rings at %#" PRIx64 ", %#" PRIx64 ", %#" PRIx64
			       " are misaligned or outside of guest memory",
			       vq->desc_user, vq->avail_user, vq->used_user);
		return rc;
	}
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

static uint64_t log_size(const struct virtqueue *vq)
{
	return vq->is_packed ? vq_inflight_size(vq->size)
			     : sizeof(struct inflight_split) + vq->size * sizeof(struct inflight_split_desc);
}

static int open_log(struct virtqueue *vq, const struct vq_setup *setup)
{
	const struct inflight_split *header;
	int rc;

	if (setup->inflight_size < log_size(vq) || setup->inflight_offset % 8 != 0) {
		return -EINVAL;
	}
	rc = mapping_create(&vq->log_mapping, setup->inflight_fd, setup->inflight_offset, setup->inflight_size,
			    &vq->lost);
	if (rc < 0 || !setup->recover) {
		return rc;
	}
	/* Both formats begin alike; version 0 is a log that nobody has used yet. */
	header = (const struct inflight_split *)vq->log_mapping.data;
	if (header->version != 0 && (header->version != INFLIGHT_VERSION || header->desc_num != vq->size)) {
		vq_break(vq, -EINVAL, "in-flight log: version %u for %u entries, expected version %u for %u",
			 header->version, header->desc_num, INFLIGHT_VERSION, vq->size);
		return -EINVAL;
	}
	return 0;
}

static int allocate_order(struct virtqueue *vq)
{
	struct vq_order *order = &vq->order;

	if (!vq->in_order) {
		return 0;
	}
	order->slots = calloc(vq->size, sizeof(*order->slots));
	order->written = calloc(vq->size, sizeof(*order->written));
	order->finished = calloc(vq->size, sizeof(*order->finished));
	return order->slots && order->written && order->finished ? 0 : -ENOMEM;
}

static int start(struct virtqueue *vq, struct guest_memory *memory, const struct vq_setup *setup)
{
	int rc;

	if (setup->size == 0 || setup->size > VQ_MAX_SIZE) {
		return -EINVAL;
	}
	vq->size = (uint16_t)setup->size;
	vq->desc_user = setup->desc;
	vq->avail_user = setup->avail;
	vq->used_user = setup->used;
	vq->is_packed = has_feature(setup, VIRTIO_F_RING_PACKED);
	vq->event_idx = has_feature(setup, VIRTIO_F_EVENT_IDX);
	vq->indirect = has_feature(setup, VIRTIO_F_INDIRECT_DESC);
	vq->in_order = has_feature(setup, VIRTIO_F_IN_ORDER);
	vq->log_data = has_feature(setup, VHOST_F_LOG_ALL);
	vq->log_used = vq->log_data && setup->log_used;
	vq->used_log = setup->used_log;
	/* A legacy feature: legacy drivers have no packed rings. */
	vq->notify_on_empty = !vq->is_packed && has_feature(setup, VIRTIO_F_NOTIFY_ON_EMPTY);
	rc = take_fds(vq, setup);
	if (rc == 0) {
		rc = allocate_order(vq);
	}
	if (rc == 0) {
		rc = vq_set_memory(vq, memory);
	}
	if (rc == 0) {
		rc = open_log(vq, setup);
	}
	if (rc < 0) {
		return rc;
	}
	return vq->is_packed ? packed_start(vq, setup->base, setup->recover)
			     : split_start(vq, setup->base, setup->recover);
}

static void log_whole_ring(struct virtqueue *vq)
{
	if (vq->is_packed) {
		dirty_host(vq->memory, vq->packed.desc, (uint64_t)vq->size * sizeof(vq->packed.desc[0]));
	} else {
		dirty_guest(vq->memory, vq->used_log,
			    sizeof(struct vring_used) + (uint64_t)vq->size * sizeof(struct vring_used_elem));
	}
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
	if (setup->recover && vq->log_used) {
		/* Whoever published last may have been killed before it noted what it had written. */
		log_whole_ring(vq);
	}
	if (setup->recover || setup->base != (vq->is_packed ? PACKED_BEGIN : 0)) {
		/*
		 * Whoever published last may have been killed before it could signal; or its signal went to a
		 * descriptor that the front-end had stopped looking at when it sent another one
		 * (SET_VRING_CALL), and a driver that waits would wait for ever. One too many does no harm.
		 */
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

int vq_set_call(struct virtqueue *vq, int call_fd)
{
	int own;
	int rc = take_fd(call_fd, &own);

	if (rc < 0) {
		return rc;
	}
	close_fd(&vq->call_fd);
	vq->call_fd = own;
	/*
	 * What was published meanwhile was signalled to nobody, or to a descriptor that the front-end had
	 * looked at for the last time before it sent this one (QEMU, when the guest unmasks a vector): a driver
	 * that waits would wait for ever. One signal too many does no harm.
	 */
	signal_fd(vq->call_fd);
	return 0;
}

void vq_stop(struct virtqueue *vq)
{
	close_fd(&vq->kick_fd);
	close_fd(&vq->call_fd);
	close_fd(&vq->error_fd);
	mapping_destroy(&vq->log_mapping);
	if (vq->memory != NULL) {
		guest_memory_put(vq->memory);
	}
	if (vq->is_packed) {
		packed_free(vq);
	} else {
		split_free(vq);
	}
	free(vq->order.slots);
	free(vq->order.written);
	free(vq->order.finished);
	free(vq->resubmit);
	memset(vq, 0, sizeof(*vq));
	vq->kick_fd = vq->call_fd = vq->error_fd = -1;
}

uint32_t vq_base(const struct virtqueue *vq)
{
	return vq->is_packed ? packed_base(vq) : split_base(vq);
}

/* --- taking ----------------------------------------------------------------------------------------- */

static int by_counter(const void *a, const void *b)
{
	const struct ring_in_flight *x = a, *y = b;

	return x->counter < y->counter ? -1 : x->counter > y->counter;
}

int ring_resubmit(struct virtqueue *vq, struct ring_in_flight *found, uint32_t count)
{
	if (count == 0) {
		return 0;
	}
	vq->resubmit = calloc(count, sizeof(*vq->resubmit));
	if (vq->resubmit == NULL) {
		return -ENOMEM;
	}
	qsort(found, count, sizeof(*found), by_counter);
	for (uint32_t i = 0; i < count; i++) {
		vq->resubmit[i] = found[i].slot;
		vq->counter = found[i].counter + 1;
	}
	vq->resubmit_count = count;
	return 0;
}

static unsigned take_again(struct virtqueue *vq, uint16_t *slots, unsigned max)
{
	unsigned n = 0;

	while (n < max && vq->resubmit_next < vq->resubmit_count) {
		slots[n] = vq->resubmit[vq->resubmit_next++];
		if (!vq->is_packed) {
			split_take_again(vq, slots[n]);
		}
		n++;
	}
	return n;
}

static inline bool has_lost_memory(struct virtqueue *vq)
{
	if (likely(!is_memory_lost(vq))) {
		return false;
	}
	vq_break(vq, -EFAULT, "memory is lost");
	return true;
}

static void order_add(struct virtqueue *vq, const uint16_t *slots, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		vq->order.slots[((uint32_t)vq->order.first + vq->order.count++) % vq->size] = slots[i];
	}
}

unsigned vq_take(struct virtqueue *vq, uint16_t *slots, unsigned max)
{
	unsigned n;

	if (unlikely(vq->broken || has_lost_memory(vq))) {
		return 0;
	}
	if (unlikely(vq_has_resubmits(vq))) {
		n = take_again(vq, slots, max);
	} else if (vq->is_packed) {
		n = packed_take(vq, slots, max);
	} else {
		n = split_take(vq, slots, max);
	}
	if (vq->in_order) {
		order_add(vq, slots, n);
	}
	return n;
}

void vq_put_back(struct virtqueue *vq, const uint16_t *slots, unsigned n, bool again)
{
	if (vq->in_order) {
		vq->order.count -= (uint16_t)n;
	}
	if (again) {
		vq->resubmit_next -= n;
	}
	while (n-- > 0) {
		if (!vq->is_packed && again) {
			split_put_back_again(vq, slots[n]);
		} else if (!vq->is_packed) {
			split_put_back(vq, slots[n]);
		} else if (!again) {
			packed_put_back(vq, slots[n]);
		}
	}
}

/* --- reading chains --------------------------------------------------------------------------------- */

/* Find a table whose address has to be translated: it lies in one piece, whatever its IOVAs are. */
static int translate_table(struct virtqueue *vq, uint64_t addr, uint32_t len, const void **table)
{
	struct iovec iov;
	int n = iotlb_iov(vq->memory->iotlb, addr, len, IOTLB_READ, &iov, 1, &vq->miss);

	if (n == 1) {
		*table = iov.iov_base;
		return 0;
	}
	if (n != -EAGAIN) {
		vq_break(vq, n, "indirect table at IOVA %#" PRIx64 ", %u bytes: not in one piece of memory",
			 addr, len);
	}
	return n;
}

int ring_open_indirect(struct virtqueue *vq, uint64_t addr, uint32_t len, uint16_t flags, const void **table,
		       uint32_t *count)
{
	if (!vq->indirect) {
		vq_break(vq, -EINVAL, "indirect descriptor, which was not negotiated");
		return -EINVAL;
	}
	if (flags & VRING_DESC_NEXT || len == 0 || len % sizeof(struct vring_desc) != 0) {
		vq_break(vq, -EINVAL, "indirect table of %u bytes, flags %#x", len, flags);
		return -EINVAL;
	}
	*count = len / sizeof(struct vring_desc);
	if (unlikely(vq->memory->iotlb != NULL)) {
		return translate_table(vq, addr, len, table);
	}
	*table = guest_memory_at(vq->memory, addr, len);
	if (*table == NULL) {
		vq_break(vq, -EFAULT, "indirect table at %#" PRIx64 ", %u bytes: outside of guest memory", addr,
			 len);
		return -EFAULT;
	}
	return 0;
}

int chain_add_slow(struct virtqueue *vq, uint64_t addr, uint32_t len, uint16_t flags, struct iovec *iov,
		   uint32_t room)
{
	uint32_t access = flags & VRING_DESC_WRITE ? IOTLB_WRITE : IOTLB_READ;
	int n = vq->memory->iotlb == NULL
		    ? guest_memory_iov(vq->memory, addr, len, iov, room)
		    : iotlb_iov(vq->memory->iotlb, addr, len, access, iov, room, &vq->miss);

	if (n < 0 && n != -EAGAIN && n != -ENOBUFS) {
		vq_break(vq, n, "buffer at %#" PRIx64 ", %u bytes: outside of guest memory", addr, len);
	}
	return n;
}

int chain_out_of_order(struct virtqueue *vq, uint64_t addr)
{
	vq_break(vq, -EINVAL, "readable buffer at %#" PRIx64 " follows a writable one", addr);
	return -EINVAL;
}

int vq_read_chain(struct virtqueue *vq, uint16_t slot, struct vq_chain *chain)
{
	int rc = vq->is_packed ? packed_read_chain(vq, slot, chain) : split_read_chain(vq, slot, chain);

	if (unlikely(rc == -ENOBUFS && chain->room >= VQ_MAX_SEGMENTS)) {
		vq_break(vq, rc, "chain is too long: more than %d buffers", VQ_MAX_SEGMENTS);
	}
	return rc;
}

/* --- completing ------------------------------------------------------------------------------------- */

static inline void complete(struct virtqueue *vq, uint16_t slot, uint32_t written)
{
	if (vq->is_packed) {
		packed_complete(vq, slot, written);
	} else {
		split_complete(vq, slot, written);
	}
}

static void complete_in_order(struct virtqueue *vq, uint16_t slot, uint32_t written)
{
	struct vq_order *order = &vq->order;

	order->written[slot] = written;
	order->finished[slot] = 1;
	while (order->count > 0 && order->finished[order->slots[order->first]]) {
		uint16_t first = order->slots[order->first];

		order->finished[first] = 0;
		order->first = (uint16_t)((order->first + 1u) % vq->size);
		order->count--;
		complete(vq, first, order->written[first]);
	}
}

void vq_complete(struct virtqueue *vq, uint16_t slot, uint32_t written)
{
	if (unlikely(vq->in_order)) {
		complete_in_order(vq, slot, written);
	} else {
		complete(vq, slot, written);
	}
}

static inline bool is_empty(const struct virtqueue *vq)
{
	return vq->is_packed ? packed_is_empty(vq) : split_is_empty(vq);
}

bool vq_wants_signal(const struct virtqueue *vq)
{
	bool wanted = vq->is_packed ? packed_wants_signal(vq) : split_wants_signal(vq);

	/* Section 6.3 of virtio 0.9.5: when the ring has run empty, even if the driver wants silence. */
	return wanted || !vq->signalled || (vq->notify_on_empty && is_empty(vq));
}

/* Whether to signal for what was published since this was last asked. */
static bool decide_signal(struct virtqueue *vq)
{
	bool wanted = vq_wants_signal(vq);

	vq->signalled = true;
	if (vq->is_packed) {
		vq->packed.signalled_idx = vq->packed.used_idx;
	} else {
		vq->split.signalled_idx = vq->split.used_idx;
	}
	return wanted;
}

static inline bool signal_if_wanted(struct virtqueue *vq)
{
	/* The driver must see what was published, or we what it asks for: sections 2.7.7.2 and 2.8.10.2. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (decide_signal(vq)) {
		vq->calls++;
		signal_fd(vq->call_fd);
		return true;
	}
	return false;
}

/* Publish what was completed; returns how many requests that was. */
static uint32_t publish(struct virtqueue *vq)
{
	uint32_t count = vq->is_packed ? packed_publish(vq) : split_publish(vq);

	if (unlikely(count > 0 && vq->log_data)) {
		dirty_signal(vq->memory);
	}
	return count;
}

void vq_publish(struct virtqueue *vq)
{
	if (unlikely(vq->broken)) {
		return;
	}
	if (publish(vq) > 0) {
		signal_if_wanted(vq);
	}
}

uint32_t vq_publish_silently(struct virtqueue *vq, uint32_t *entries)
{
	uint16_t before = vq->is_packed ? vq->packed.used_idx : 0;
	uint32_t count;

	if (unlikely(vq->broken)) {
		return 0;
	}
	count = publish(vq);
	if (!vq->is_packed) {
		*entries = count;
		return count;
	}
	*entries = vq->packed.used_idx > before ? vq->packed.used_idx - before
						: vq->packed.used_idx + vq->size - before;
	return count;
}

bool vq_signal(struct virtqueue *vq)
{
	return signal_if_wanted(vq);
}

/* --- kicks ------------------------------------------------------------------------------------------ */

static inline void set_kicks(struct virtqueue *vq, bool on)
{
	if (vq->is_packed) {
		packed_set_kicks(vq, on);
	} else {
		split_set_kicks(vq, on);
	}
}

bool vq_wait(struct virtqueue *vq)
{
	if (vq->broken) {
		return false;
	}
	set_kicks(vq, true);
	/* The driver must see that we want kicks, or we its new entries: section 2.7.10.1. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return vq_has_resubmits(vq) || !is_empty(vq);
}

void vq_unwait(struct virtqueue *vq)
{
	set_kicks(vq, false);
}
