#include "vhost/iotlb.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* The first entry that ends after @iova, or count. */
static uint32_t lower_bound(const struct iotlb *iotlb, uint64_t iova)
{
	uint32_t low = 0, high = iotlb->count;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;
		const struct iotlb_entry *entry = &iotlb->entries[middle];

		if (entry->iova + (entry->size - 1) < iova) {
			low = middle + 1;
		} else {
			high = middle;
		}
	}
	return low;
}

static inline bool holds(const struct iotlb_entry *entry, uint64_t iova)
{
	return iova - entry->iova < entry->size;
}

static const struct iotlb_entry *find(struct iotlb *iotlb, uint64_t iova)
{
	uint32_t place = iotlb->last;

	if (place < iotlb->count && holds(&iotlb->entries[place], iova)) {
		return &iotlb->entries[place];
	}
	place = lower_bound(iotlb, iova);
	if (place == iotlb->count || !holds(&iotlb->entries[place], iova)) {
		return NULL;
	}
	iotlb->last = place;
	return &iotlb->entries[place];
}

/* --- what the control process does ------------------------------------------------------------------- */

int iotlb_create(struct guest_memory *memory)
{
	if (memory->iotlb != NULL) {
		return -EEXIST;
	}
	memory->iotlb = calloc(1, sizeof(*memory->iotlb));
	return memory->iotlb != NULL ? 0 : -ENOMEM;
}

void iotlb_free(struct iotlb *iotlb)
{
	free(iotlb);
}

static bool find_region(const struct guest_memory *memory, uint64_t user, uint64_t size, uint32_t *region)
{
	for (uint32_t i = 0; i < memory->count; i++) {
		uint64_t offset = user - memory->regions[i].user;

		if (offset < memory->regions[i].size && size <= memory->regions[i].size - offset) {
			*region = i;
			return true;
		}
	}
	return false;
}

int iotlb_add(struct guest_memory *memory, uint64_t iova, uint64_t size, uint64_t user, uint32_t access)
{
	struct iotlb *iotlb = memory->iotlb;
	struct iotlb_entry *entry;
	uint32_t place, region;

	if (iotlb == NULL || size == 0 || iova + (size - 1) < iova || access == 0 ||
	    (access & ~(uint32_t)(IOTLB_READ | IOTLB_WRITE)) != 0) {
		return -EINVAL;
	}
	if (!find_region(memory, user, size, &region)) {
		return -EFAULT;
	}
	place = lower_bound(iotlb, iova);
	if (place < iotlb->count && iotlb->entries[place].iova <= iova + (size - 1)) {
		return -EINVAL;
	}
	if (iotlb->count == IOTLB_ENTRIES) {
		return -ENOSPC;
	}
	entry = &iotlb->entries[place];
	memmove(entry + 1, entry, (iotlb->count - place) * sizeof(*entry));
	iotlb->count++;
	entry->iova = iova;
	entry->size = size;
	entry->host = memory->regions[region].host + (user - memory->regions[region].user);
	entry->region = region;
	entry->access = access;
	return 0;
}

uint32_t iotlb_remove(struct guest_memory *memory, uint64_t first, uint64_t last)
{
	struct iotlb *iotlb = memory->iotlb;
	struct iotlb_entry *entry;
	uint32_t place, end;

	if (iotlb == NULL || first > last) {
		return 0;
	}
	place = end = lower_bound(iotlb, first);
	while (end < iotlb->count && iotlb->entries[end].iova <= last) {
		end++;
	}
	entry = &iotlb->entries[place];
	memmove(entry, &iotlb->entries[end], (iotlb->count - end) * sizeof(*entry));
	iotlb->count -= end - place;
	return end - place;
}

int iotlb_settle(struct guest_memory *memory)
{
	struct iotlb *iotlb = memory->iotlb;

	if (!iotlb_settled(memory)) {
		return -EBUSY;
	}
	if (iotlb != NULL) {
		iotlb->epoch ^= 1;
	}
	return 0;
}

bool iotlb_settled(const struct guest_memory *memory)
{
	return memory->iotlb == NULL || memory->iotlb->users[memory->iotlb->epoch ^ 1] == 0;
}

/* --- the data path ----------------------------------------------------------------------------------- */

int iotlb_iov(struct iotlb *iotlb, uint64_t iova, uint64_t length, uint32_t access, struct iovec *iov,
	      uint32_t room, struct iotlb_miss *miss)
{
	const struct iotlb_entry *before = NULL;
	uint32_t n = 0;

	if (length > 0 && iova + (length - 1) < iova) {
		return -EFAULT;
	}
	while (length > 0) {
		const struct iotlb_entry *entry = find(iotlb, iova);
		uint64_t offset, part;

		if (entry == NULL || (entry->access & access) != access) {
			*miss = (struct iotlb_miss){.iova = iova, .size = length, .access = access};
			return -EAGAIN;
		}
		offset = iova - entry->iova;
		part = entry->size - offset < length ? entry->size - offset : length;
		/* The entry before this one ends at this IOVA: joined if its memory ends here, too. */
		if (before != NULL && before->region == entry->region &&
		    before->host + before->size == entry->host) {
			iov[n - 1].iov_len += part;
		} else if (n == room) {
			return -ENOBUFS;
		} else {
			iov[n].iov_base = entry->host + offset;
			iov[n].iov_len = part;
			n++;
		}
		before = entry;
		iova += part;
		length -= part;
	}
	return (int)n;
}
