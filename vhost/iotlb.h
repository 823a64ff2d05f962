/*
 * The translations of a front-end's IOMMU that one process has been told: I/O virtual addresses (IOVA), which
 * the driver writes into descriptors once VIRTIO_F_ACCESS_PLATFORM is negotiated, to what is mapped here
 * (vhost-user specification, "IOMMU support").
 *
 * It is a cache that the control process fills and empties. An address that it does not know is a miss: the
 * request waits in its ring until the control process has asked the front-end (vhost/translation.py). It
 * belongs to a table of guest memory; without one, addresses are guest-physical and nothing here is reached.
 */
#ifndef VHOST_IOTLB_H
#define VHOST_IOTLB_H

#include "vhost/memory.h"

/* cffi: begin */
#define IOTLB_ENTRIES 16384 /* that a table holds: the control process forgets the oldest first */
#define IOTLB_READ 1	    /* the device may read: VHOST_ACCESS_RO */
#define IOTLB_WRITE 2	    /* the device may write: VHOST_ACCESS_WO */

/* What has no translation: @access to somewhere in [iova, iova + size), and nothing before @iova. */
struct iotlb_miss {
	uint64_t iova;
	uint64_t size;
	uint32_t access;
};

/* Have the chains of a table of memory, which nobody uses yet, name IOVAs. 0 or -errno. */
int iotlb_create(struct guest_memory *memory);
/*
 * [iova, iova + size) is at the front-end's @user address. 0, -EINVAL (no size, overflow, no access, an overlap
 * with another entry), -EFAULT (not in one region of memory), -ENOSPC.
 */
int iotlb_add(struct guest_memory *memory, uint64_t iova, uint64_t size, uint64_t user, uint32_t access);
/* Forget every entry that has an address of [first, last]. Returns how many these were. */
uint32_t iotlb_remove(struct guest_memory *memory, uint64_t first, uint64_t last);
/*
 * Begin to tell requests that are taken from now on from those before. -EBUSY while requests from before the
 * last time are in flight; else 0, and iotlb_settled() turns true when those from before this time are over.
 */
int iotlb_settle(struct guest_memory *memory);
bool iotlb_settled(const struct guest_memory *memory);
/* cffi: end */

struct iotlb_entry {
	uint64_t iova;
	uint64_t size;
	uint8_t *host;
	uint32_t region; /* of guest memory: pieces of two are never joined, see dirty_host() */
	uint32_t access;
};

struct iotlb {
	uint32_t count;
	uint32_t last; /* where the last look-up hit */
	uint32_t epoch;
	uint32_t users[2]; /* requests in flight, by the epoch in which they were taken */
	struct iotlb_entry entries[IOTLB_ENTRIES]; /* sorted, without overlaps */
};

/* A request is taken: returns the epoch, for iotlb_leave(). */
static inline uint8_t iotlb_enter(struct iotlb *iotlb)
{
	iotlb->users[iotlb->epoch]++;
	return (uint8_t)iotlb->epoch;
}

static inline void iotlb_leave(struct iotlb *iotlb, uint8_t epoch)
{
	iotlb->users[epoch]--;
}

/*
 * Describe [iova, iova + length) by iovecs, of which adjacent ones are joined. Returns how many, or -EFAULT
 * (past the end of addresses), -ENOBUFS (more than @room), -EAGAIN (@miss says what is not known).
 */
int iotlb_iov(struct iotlb *iotlb, uint64_t iova, uint64_t length, uint32_t access, struct iovec *iov,
	      uint32_t room, struct iotlb_miss *miss);

/* Free; a no-op for NULL. */
void iotlb_free(struct iotlb *iotlb);

#endif
