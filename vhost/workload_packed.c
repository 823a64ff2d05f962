/*
 * Requests in packed rings. A descriptor goes wherever the ring stands, so nothing in the ring can be laid
 * out before; an indirect table can. The slot's number is the identifier.
 */
#include "vhost/workload_internal.h"

void load_lay_out_packed(struct load *load, struct load_slot *slot)
{
	uint32_t header = load->options.scsi ? LOAD_SCSI_HEADER : LOAD_HEADER;
	struct vring_packed_desc *table = (void *)((uint8_t *)slot->wire + load_wire_bytes(&load->options));
	uint32_t i;

	if (!load->options.indirect) {
		return;
	}
	table[0] = (struct vring_packed_desc){.addr = slot->wire_addr, .len = header};
	for (i = 0; i < load->buffers; i++) {
		table[1 + i] = (struct vring_packed_desc){.addr = slot->data_addr +
								  (uint64_t)i * load->options.segment_size,
							  .len = load_buffer_bytes(load, i)};
	}
	table[1 + i] =
	    (struct vring_packed_desc){.addr = slot->wire_addr + offsetof(struct wire_request, status),
				       .len = 1,
				       .flags = VRING_DESC_WRITE};
	slot->packed_table = table + 1;
}

void load_issue_packed(struct load *load, struct load_slot *slot)
{
	struct front_queue *queue = load->queue;
	uint16_t data_flags = slot->kind == SLOT_WRITE ? 0 : VRING_DESC_WRITE;
	uint64_t addr = slot->data_addr;

	if (load->options.indirect) {
		for (uint32_t i = 0; i < load->buffers; i++) {
			slot->packed_table[i].flags = data_flags;
		}
		front_packed_put(queue, slot->wire_addr + LOAD_SLOT_SIZE,
				 (load->buffers + 2) * (uint32_t)sizeof(struct vring_packed_desc), slot->head,
				 VRING_DESC_INDIRECT);
		return;
	}
	front_packed_put(queue, slot->wire_addr, LOAD_HEADER, slot->head, VRING_DESC_NEXT);
	for (uint32_t i = 0; i < load->buffers; i++) {
		front_packed_put(queue, addr, load_buffer_bytes(load, i), slot->head,
				 data_flags | VRING_DESC_NEXT);
		addr += load->options.segment_size;
	}
	front_packed_put(queue, slot->wire_addr + offsetof(struct wire_request, status), 1, slot->head,
			 VRING_DESC_WRITE);
}
