/*
 * An EXTENDED COPY that comes from the in-flight log of a process that is gone: it may have been carried out in
 * part. To begin again is right where nothing that it reads is written by it afterwards.
 */
#include "scsi/copy.h"
#include "scsi/spec.h"
#include "scsi/unit.h"

#define SEGMENT_DESTINATION_COUNT 0x02 /* DC: blocks of the destination */

struct extent {
	const struct scsi_shared *unit; /* by what all its LUNs have in common; NULL: there is nothing */
	uint64_t first;			/* bytes */
	uint64_t length;
};

static struct scsi_unit *cscd_of(struct scsi_unit *const *cscds, const uint8_t *segment, unsigned at)
{
	uint16_t index = get_be16(segment + at);

	return index < COPY_MAX_CSCDS && cscds[index] != NULL && cscds[index]->bdev != NULL ? cscds[index]
											    : NULL;
}

/* What a segment reads or writes. Where that is not on the medium it is nothing: the segment fails. */
static struct extent extent_of(struct scsi_unit *const *cscds, const uint8_t *segment, bool written)
{
	const struct scsi_unit *from = cscd_of(cscds, segment, 4);
	const struct scsi_unit *to = cscd_of(cscds, segment, 6);
	const struct scsi_unit *unit = written ? to : from;
	uint64_t lba = get_be64(segment + (written ? 20 : 12));
	struct extent found = {0};

	if (from != NULL && to != NULL && lba < unit_blocks(unit)) {
		uint32_t size = unit_block_size(segment[1] & SEGMENT_DESTINATION_COUNT ? to : from);

		found.unit = unit->shared;
		found.first = lba * unit_block_size(unit);
		found.length = (uint64_t)get_be16(segment + 10) * size;
	}
	return found;
}

static bool overlap(const struct extent *a, const struct extent *b)
{
	return a->unit != NULL && a->unit == b->unit && a->first < b->first + b->length &&
	       b->first < a->first + a->length;
}

bool copy_can_repeat(struct scsi_unit *const *cscds, const uint8_t *segments, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		struct extent source = extent_of(cscds, segments + i * COPY_SEGMENT_SIZE, false);

		for (uint32_t j = i; j < count; j++) {
			struct extent written = extent_of(cscds, segments + j * COPY_SEGMENT_SIZE, true);

			if (overlap(&source, &written)) {
				return false;
			}
		}
	}
	return true;
}
