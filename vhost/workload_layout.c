/* Checking options, and laying everything out before a load starts. */
#include "vhost/pattern.h"
#include "vhost/workload_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static uint32_t buffers_of(const struct load_options *options)
{
	return (options->block_size + options->segment_size - 1) / options->segment_size;
}

uint32_t load_ring_descriptors(const struct load_options *options)
{
	return options->indirect ? 1 : buffers_of(options) + 2;
}

uint32_t load_slot_bytes(const struct load_options *options)
{
	uint32_t table = (buffers_of(options) + 2) * (uint32_t)sizeof(struct vring_desc);

	return load_wire_bytes(options) +
	       (options->indirect ? (table + LOAD_LINE - 1) / LOAD_LINE * LOAD_LINE : 0);
}

/* Descriptors from one slot's head to the next: a whole cache line where the ring has room for that. */
static uint32_t ring_stride(const struct front_queue *queue, const struct load_options *options)
{
	uint32_t needed = load_ring_descriptors(options);
	uint32_t line = LOAD_LINE / sizeof(struct vring_desc);
	uint32_t rounded = (needed + line - 1) / line * line;

	return !options->indirect && rounded * options->depth <= queue->size ? rounded : needed;
}

static void lay_out_chain(struct load *load, struct load_slot *slot, struct vring_desc *descs, uint16_t first,
			  uint64_t wire_addr)
{
	uint32_t i;

	uint32_t header = load->options.scsi ? LOAD_SCSI_HEADER : LOAD_HEADER;

	descs[0] = (struct vring_desc){wire_addr, header, VRING_DESC_NEXT, (uint16_t)(first + 1)};
	for (i = 1; i <= load->buffers; i++) {
		descs[i] = (struct vring_desc){.flags = VRING_DESC_NEXT, .next = (uint16_t)(first + i + 1)};
		descs[i].len = load_buffer_bytes(load, i - 1);
	}
	descs[i] =
	    (struct vring_desc){wire_addr + offsetof(struct wire_request, status), 1, VRING_DESC_WRITE, 0};
	slot->buffers = descs + 1;
}

static void *table_of(const struct load *load, const struct load_slot *slot)
{
	return (uint8_t *)slot->wire + load_wire_bytes(&load->options);
}

static void lay_out_split(struct load *load, struct load_slot *slot, uint32_t index)
{
	const struct load_options *options = &load->options;

	slot->head = (uint16_t)(index * ring_stride(load->queue, options));
	if (options->indirect) {
		lay_out_chain(load, slot, table_of(load, slot), 0, slot->wire_addr);
		load->queue->desc[slot->head] = (struct vring_desc){
		    slot->wire_addr + load_wire_bytes(options),
		    (load->buffers + 2) * (uint32_t)sizeof(struct vring_desc), VRING_DESC_INDIRECT, 0};
	} else {
		lay_out_chain(load, slot, &load->queue->desc[slot->head], slot->head, slot->wire_addr);
	}
}

static void lay_out(struct load *load, uint32_t index)
{
	const struct load_options *options = &load->options;
	struct load_slot *slot = &load->slots[index];
	uint64_t at = (uint64_t)index * load_slot_bytes(options);

	slot->wire = (struct wire_request *)((uint8_t *)options->slots + at);
	slot->data = (uint8_t *)options->data + (uint64_t)index * options->block_size;
	slot->data_addr = options->data_addr + (uint64_t)index * options->block_size;
	slot->wire_addr = options->slots_addr + at;
	slot->kind = SLOT_FREE;
	slot->wire->reserved = 0;
	if (options->scsi) {
		load_lay_out_scsi(load, slot, index);
	}
	if (load->queue->packed) {
		slot->head = (uint16_t)index;
		load_lay_out_packed(load, slot);
	} else {
		lay_out_split(load, slot, index);
	}
	load->slot_of_head[slot->head] = (uint16_t)index;
	load->free[index] = (uint16_t)index;
	for (uint32_t i = 0; i < options->block_size; i += LOAD_SECTOR) {
		pattern_fill((uint64_t *)(slot->data + i), i, index); /* not zeroes: those may be cheaper */
	}
}

static int check_options(const struct front_queue *queue, const struct load_options *options)
{
	if (options->block_size == 0 || options->block_size % LOAD_SECTOR || options->segment_size == 0 ||
	    options->segment_size % LOAD_SECTOR || options->size < options->block_size ||
	    options->size % options->block_size || options->offset % LOAD_SECTOR || options->depth == 0 ||
	    options->depth > LOAD_MAX_DEPTH || options->read_percent > 100 || queue->pending) {
		return EINVAL;
	}
	if (options->scsi && (options->logical_block == 0 || options->block_size % options->logical_block ||
			      options->offset % options->logical_block)) {
		return EINVAL;
	}
	/* A block is in flight once at most while verifying, so there must be others to choose. */
	if (options->verify && options->size / options->block_size <= options->depth) {
		return EINVAL;
	}
	return (uint64_t)load_ring_descriptors(options) * options->depth > queue->size ? ENOSPC : 0;
}

static void free_load(struct load *load)
{
	free(load->slots);
	free(load->slot_of_head);
	free(load->free);
	free(load->generations);
	free(load);
}

struct load *load_create(struct front_queue *queue, const struct load_options *options)
{
	int error = check_options(queue, options);
	struct load *load = error ? NULL : aligned_alloc(LOAD_LINE, (sizeof(*load) + 63) / 64 * 64);

	if (!load) {
		errno = error ? error : ENOMEM;
		return NULL;
	}
	memset(load, 0, sizeof(*load));
	load->queue = queue;
	load->options = *options;
	load->buffers = buffers_of(options);
	load->blocks = options->size / options->block_size;
	load->random = (uint64_t)options->seed * 0x9e3779b97f4a7c15 + 1;
	load->slots = aligned_alloc(LOAD_LINE, options->depth * sizeof(*load->slots));
	load->slot_of_head = malloc(queue->size * sizeof(*load->slot_of_head));
	load->free = malloc(options->depth * sizeof(*load->free));
	load->generations = options->verify ? calloc(load->blocks, sizeof(*load->generations)) : NULL;
	if (!load->slots || !load->slot_of_head || !load->free || (options->verify && !load->generations)) {
		free_load(load);
		errno = ENOMEM;
		return NULL;
	}
	memset(load->slot_of_head, 0xff, queue->size * sizeof(*load->slot_of_head)); /* LOAD_NO_SLOT */
	for (uint32_t i = 0; i < options->depth; i++) {
		lay_out(load, i);
	}
	load->free_count = options->depth;
	return load;
}

void load_destroy(struct load *load)
{
	if (load) {
		front_queue_reset(load->queue);
		free_load(load);
	}
}
