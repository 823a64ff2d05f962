/* Verification. While a request for a block is in flight no other is, so what it must hold is known. */
#include "vhost/pattern.h"
#include "vhost/workload_internal.h"

#include <string.h>

static uint64_t stamp_of(const struct load *load, uint32_t generation)
{
	return (uint64_t)load->options.seed << 32 | generation;
}

void load_prepare_data(struct load *load, struct load_slot *slot)
{
	uint64_t offset = load_slot_offset(load, slot);

	if (slot->kind != SLOT_WRITE) {
		/* What is there may be just what is expected. */
		memset(slot->data, 0x5a, load->options.block_size);
		return;
	}
	load->generation++;
	slot->generation = load->generation;
	for (uint32_t i = 0; i < load->options.block_size; i += LOAD_SECTOR) {
		pattern_fill((uint64_t *)(slot->data + i), offset + i, stamp_of(load, slot->generation));
	}
}

void load_check_data(struct load *load, const struct load_slot *slot)
{
	struct load_results *results = &load->results;
	uint32_t generation = load->generations[slot->block] & ~GENERATION_BUSY;
	uint64_t offset = load_slot_offset(load, slot);
	uint64_t unwritten = 0;

	if (generation == GENERATION_UNKNOWN) {
		return;
	}
	for (uint32_t i = 0; i < load->options.block_size; i += LOAD_SECTOR) {
		const uint64_t *sector = (const uint64_t *)(slot->data + i);
		struct pattern_difference found;
		enum pattern_verdict verdict =
		    generation ? pattern_check(sector, offset + i, stamp_of(load, generation), &found)
			       : pattern_check_unknown(sector, offset + i, &found);

		if (verdict == PATTERN_BAD) {
			if (results->mismatches < LOAD_MISMATCHES) {
				results->mismatch[results->mismatches] =
				    (struct load_mismatch){found.offset, found.expected, found.got};
			}
			results->mismatches++;
			return;
		}
		unwritten += verdict == PATTERN_NONE;
	}
	results->unwritten += unwritten;
	results->verified += unwritten == 0;
}
