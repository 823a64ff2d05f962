/*
 * What a virtqueue and its in-flight log look like in memory: virtio 1.2, sections 2.7 and 2.8, and the
 * vhost-user specification, "Inflight I/O tracking". All fields are little-endian.
 */
#ifndef VHOST_VRING_H
#define VHOST_VRING_H

#include <stddef.h>
#include <stdint.h>

/* Feature bits that concern rings (section 6). */
#define VIRTIO_F_NOTIFY_ON_EMPTY 24
#define VHOST_F_LOG_ALL 26 /* vhost-user's own: log what is written into guest memory */
#define VIRTIO_F_INDIRECT_DESC 28
#define VIRTIO_F_EVENT_IDX 29
#define VIRTIO_F_VERSION_1 32
#define VIRTIO_F_RING_PACKED 34
#define VIRTIO_F_IN_ORDER 35
#define VIRTIO_F_RING_RESET 40

/* Descriptor flags, of both formats. */
#define VRING_DESC_NEXT 1
#define VRING_DESC_WRITE 2
#define VRING_DESC_INDIRECT 4

/* --- split rings, section 2.7 ------------------------------------------------------------------------ */

struct vring_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags;
	uint16_t next;
};

struct vring_avail {
	uint16_t flags;
	uint16_t idx;
	uint16_t ring[]; /* and used_event after the last */
};

struct vring_used_elem {
	uint32_t id;
	uint32_t len;
};

struct vring_used {
	uint16_t flags;
	uint16_t idx;
	struct vring_used_elem ring[]; /* and avail_event after the last */
};

_Static_assert(sizeof(struct vring_desc) == 16, "virtio 2.7.5");
_Static_assert(sizeof(struct vring_used_elem) == 8, "virtio 2.7.8");
_Static_assert(offsetof(struct vring_used, ring) == 4, "virtio 2.7.8");

#define VRING_AVAIL_NO_INTERRUPT 1
#define VRING_USED_NO_NOTIFY 1

/* --- packed rings, section 2.8 ----------------------------------------------------------------------- */

struct vring_packed_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t id;
	uint16_t flags;
};

/* Event suppression: one written by the driver, one by the device. */
struct vring_packed_event {
	uint16_t off_wrap;
	uint16_t flags;
};

_Static_assert(sizeof(struct vring_packed_desc) == 16, "virtio 2.8.13");
_Static_assert(sizeof(struct vring_packed_event) == 4, "virtio 2.8.14");

#define VRING_PACKED_AVAIL (1u << 7)
#define VRING_PACKED_USED (1u << 15)

enum vring_packed_events {
	VRING_EVENTS_ENABLE,
	VRING_EVENTS_DISABLE,
	VRING_EVENTS_DESC, /* one, at off_wrap; only with EVENT_IDX */
};

/* --- in-flight logs ---------------------------------------------------------------------------------- */

#define INFLIGHT_VERSION 1

/* DescStateSplit and QueueRegionSplit */
struct inflight_split_desc {
	uint8_t inflight;
	uint8_t padding[5];
	uint16_t next;
	uint64_t counter;
};

struct inflight_split {
	uint64_t features;
	uint16_t version;
	uint16_t desc_num;
	uint16_t last_batch_head;
	uint16_t used_idx;
	struct inflight_split_desc desc[];
};

_Static_assert(sizeof(struct inflight_split_desc) == 16, "vhost-user DescStateSplit");
_Static_assert(offsetof(struct inflight_split, desc) == 16, "vhost-user QueueRegionSplit");

/* DescStatePacked and QueueRegionPacked */
struct inflight_packed_desc {
	uint8_t inflight;
	uint8_t padding;
	uint16_t next;
	uint16_t last;
	uint16_t num;
	uint64_t counter;
	uint16_t id;
	uint16_t flags;
	uint32_t len;
	uint64_t addr;
};

struct inflight_packed {
	uint64_t features;
	uint16_t version;
	uint16_t desc_num;
	uint16_t free_head;
	uint16_t old_free_head;
	uint16_t used_idx;
	uint16_t old_used_idx;
	uint8_t used_wrap_counter;
	uint8_t old_used_wrap_counter;
	uint8_t padding[7];
	struct inflight_packed_desc desc[];
};

_Static_assert(sizeof(struct inflight_packed_desc) == 32, "vhost-user DescStatePacked");
_Static_assert(offsetof(struct inflight_packed, desc) == 32, "vhost-user QueueRegionPacked");

#endif
