/* What both ring formats are made with: the inside of a virtqueue, for split.c, packed.c and virtqueue.c. */
#ifndef VHOST_RING_H
#define VHOST_RING_H

#include <inttypes.h>
#include <string.h>

#include "vhost/virtqueue.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* Memory shared with the driver or with another process: every access happens exactly once. */

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

static inline void store8_release(uint8_t *p, uint8_t value)
{
	__atomic_store_n(p, value, __ATOMIC_RELEASE);
}

/* The two words of a descriptor of either format. */
struct desc_words {
	uint64_t addr;
	uint64_t rest;
};

/* A word wherever the driver has put it: nothing makes it align its tables and headers. */
typedef uint64_t unaligned_word __attribute__((aligned(1), may_alias));

static inline struct desc_words load_desc_words(const void *desc)
{
	const volatile unaligned_word *words = desc;
	struct desc_words copy = {.addr = words[0], .rest = words[1]};

	return copy;
}

/* A chain while buffers are added to it: what each of them needs, in registers. */
struct chain_builder {
	const struct mapped_region *region; /* where the last buffer was: the next one most likely is too */
	struct iovec *next;
	struct iovec *end;
	struct iovec *writable; /* the first that the device may write; set when there is one */
	uint64_t readable_bytes;
	uint64_t bytes;	    /* of buffers in the direction of the last one */
	uint16_t direction; /* VRING_DESC_WRITE as the last buffer had it */
};

/* Where to look first. What an IOTLB translates is in no region. */
static inline const struct mapped_region *chain_region(const struct virtqueue *vq)
{
	static const struct mapped_region nowhere;

	return likely(vq->memory->iotlb == NULL) ? &vq->memory->regions[vq->memory->last] : &nowhere;
}

static inline struct chain_builder chain_begin(const struct virtqueue *vq, const struct vq_chain *chain)
{
	return (struct chain_builder){
	    .region = chain_region(vq),
	    .next = chain->iov,
	    .end = chain->iov + chain->room,
	};
}

/*
 * Describe by iovecs a buffer that lies in another region than the last one, or in several, or that an IOTLB
 * translates, or for which there is no room. How many, -ENOBUFS as vq_read_chain() says, or -errno after
 * breaking the queue. @flags: of its descriptor.
 */
int chain_add_slow(struct virtqueue *vq, uint64_t addr, uint32_t len, uint16_t flags, struct iovec *iov,
		   uint32_t room);
/* Break the queue because of a buffer in the wrong place; -EINVAL. */
int chain_out_of_order(struct virtqueue *vq, uint64_t addr);

/* Add a buffer to a chain. 0, -ENOBUFS as vq_read_chain() says, or -errno after breaking the queue. */
static inline int chain_add(struct chain_builder *chain, struct virtqueue *vq, uint64_t addr, uint32_t len,
			    uint16_t flags)
{
	const struct mapped_region *region = chain->region;
	uint64_t offset = addr - region->guest;

	if ((flags ^ chain->direction) & VRING_DESC_WRITE) {
		if (unlikely(chain->direction != 0)) {
			return chain_out_of_order(vq, addr);
		}
		chain->direction = VRING_DESC_WRITE;
		chain->writable = chain->next;
		chain->readable_bytes = chain->bytes;
		chain->bytes = 0;
	}
	if (likely(offset < region->size && len <= region->size - offset && chain->next < chain->end)) {
		chain->next->iov_base = region->host + offset;
		chain->next->iov_len = len;
		chain->next++;
	} else {
		int n = chain_add_slow(vq, addr, len, flags, chain->next, (uint32_t)(chain->end - chain->next));

		if (unlikely(n < 0)) {
			return n;
		}
		chain->next += n;
		chain->region = chain_region(vq);
	}
	chain->bytes += len;
	return 0;
}

static inline void chain_end(const struct chain_builder *built, struct vq_chain *chain)
{
	bool writes = built->direction != 0;
	const struct iovec *writable = writes ? built->writable : built->next;

	chain->readable = (uint32_t)(writable - chain->iov);
	chain->writable = (uint32_t)(built->next - writable);
	chain->readable_bytes = writes ? built->readable_bytes : built->bytes;
	chain->writable_bytes = writes ? built->bytes : 0;
}

/* Find an indirect table; 0, or -errno after breaking the queue. @count: descriptors in it. */
int ring_open_indirect(struct virtqueue *vq, uint64_t addr, uint32_t len, uint16_t flags, const void **table,
		       uint32_t *count);

/* A request that the log has in flight. */
struct ring_in_flight {
	uint64_t counter;
	uint16_t slot;
};

/* Serve these again, in the order of their counters. 0 or -ENOMEM. Sorts @found. */
int ring_resubmit(struct virtqueue *vq, struct ring_in_flight *found, uint32_t count);

/*
 * The formats. start: allocate, read indices, then reset or (@recover) read the log; 0 or -errno.
 * set_memory: find the rings in @memory; 0 or -errno, nothing changed.
 */
int split_start(struct virtqueue *vq, uint32_t base, bool recover);
void split_free(struct virtqueue *vq);
int split_set_memory(struct virtqueue *vq, struct guest_memory *memory);
uint32_t split_base(const struct virtqueue *vq);
unsigned split_take(struct virtqueue *vq, uint16_t *slots, unsigned max);
void split_take_again(struct virtqueue *vq, uint16_t slot);
void split_put_back(struct virtqueue *vq, uint16_t slot); /* the last one taken */
void split_put_back_again(struct virtqueue *vq, uint16_t slot);
int split_read_chain(struct virtqueue *vq, uint16_t slot, struct vq_chain *chain);
void split_complete(struct virtqueue *vq, uint16_t slot, uint32_t written);
uint32_t split_publish(struct virtqueue *vq); /* how many requests */
bool split_wants_signal(const struct virtqueue *vq);
bool split_is_empty(const struct virtqueue *vq);
void split_set_kicks(struct virtqueue *vq, bool on);

int packed_start(struct virtqueue *vq, uint32_t base, bool recover);
void packed_free(struct virtqueue *vq);
int packed_set_memory(struct virtqueue *vq, struct guest_memory *memory);
uint32_t packed_base(const struct virtqueue *vq);
unsigned packed_take(struct virtqueue *vq, uint16_t *slots, unsigned max);
void packed_put_back(struct virtqueue *vq, uint16_t slot);
int packed_read_chain(struct virtqueue *vq, uint16_t slot, struct vq_chain *chain);
void packed_complete(struct virtqueue *vq, uint16_t slot, uint32_t written);
uint32_t packed_publish(struct virtqueue *vq);
bool packed_wants_signal(const struct virtqueue *vq);
bool packed_is_empty(const struct virtqueue *vq);
void packed_set_kicks(struct virtqueue *vq, bool on);

/* Find one area of a ring by the front-end's address of it. 0, -EFAULT (outside) or -EINVAL (misaligned). */
int ring_find(struct guest_memory *memory, uint64_t user, uint64_t size, uint64_t alignment, void *area);

#endif
