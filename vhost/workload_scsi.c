/*
 * Requests of the load generator to a virtio-scsi device (virtio 1.2, section 5.6.6.1). What the device reads
 * comes first: a READ has its data last, a WRITE in the middle, so that the chain is written for each request.
 */
#include <string.h>

#include "vhost/scsi.h"
#include "vhost/workload_internal.h"

enum {
	READ_10 = 0x28,
	WRITE_10 = 0x2a,
	READ_16 = 0x88,
	WRITE_16 = 0x8a,
};

/* A command that succeeds moves one line to and fro: the head of its response ends that of the header. */
struct wire_scsi {
	struct scsi_command_header header;
	uint8_t padding;
	struct scsi_command_response response;
	uint8_t rest[LOAD_SCSI_SLOT_SIZE - 52 - sizeof(struct scsi_command_response)];
};

_Static_assert(sizeof(struct wire_scsi) == LOAD_SCSI_SLOT_SIZE, "whole lines");
_Static_assert(offsetof(struct wire_scsi, response.sense) == LOAD_LINE, "the head is in the header's line");

static struct wire_scsi *wire_of(const struct load_slot *slot)
{
	return (struct wire_scsi *)(void *)slot->wire;
}

void load_lay_out_scsi(const struct load *load, struct load_slot *slot, uint32_t index)
{
	struct wire_scsi *wire = wire_of(slot);

	memset(wire, 0, sizeof(*wire));
	memcpy(wire->header.lun, load->options.lun, sizeof(wire->header.lun));
	wire->header.tag = index;
}

static void fill_cdb(const struct load *load, const struct load_slot *slot, uint8_t *cdb)
{
	uint64_t lba = load_slot_offset(load, slot) / load->options.logical_block;
	uint32_t blocks = load->options.block_size / load->options.logical_block;
	bool write = slot->kind == SLOT_WRITE;

	if (load->options.long_cdb) {
		cdb[0] = write ? WRITE_16 : READ_16;
		put_be64(cdb + 2, lba);
		put_be32(cdb + 10, blocks);
	} else {
		cdb[0] = write ? WRITE_10 : READ_10;
		put_be32(cdb + 2, (uint32_t)lba);
		put_be16(cdb + 7, (uint16_t)blocks);
	}
}

/* One descriptor after the header's; @left: how many follow. */
static void put(struct load *load, struct load_slot *slot, uint32_t i, struct vring_desc desc)
{
	uint32_t left = load->buffers - i;

	if (!load->queue->packed) {
		slot->buffers[i].addr = desc.addr;
		slot->buffers[i].len = desc.len;
		slot->buffers[i].flags = desc.flags | (left > 0 ? VRING_DESC_NEXT : 0);
	} else if (load->options.indirect) {
		slot->packed_table[i] =
		    (struct vring_packed_desc){.addr = desc.addr, .len = desc.len, .flags = desc.flags};
	} else {
		front_packed_put(load->queue, desc.addr, desc.len, slot->head,
				 desc.flags | (left > 0 ? VRING_DESC_NEXT : 0));
	}
}

void load_issue_scsi(struct load *load, struct load_slot *slot)
{
	struct front_queue *queue = load->queue;
	struct wire_scsi *wire = wire_of(slot);
	bool write = slot->kind == SLOT_WRITE;
	uint64_t addr = slot->data_addr;
	struct vring_desc response = {
	    .addr = slot->wire_addr + offsetof(struct wire_scsi, response),
	    .len = sizeof(wire->response),
	    .flags = VRING_DESC_WRITE,
	};
	uint32_t i = 0;

	fill_cdb(load, slot, wire->header.cdb);
	wire->response.status = LOAD_NO_STATUS;
	if (queue->packed && !load->options.indirect) {
		front_packed_put(queue, slot->wire_addr, sizeof(wire->header), slot->head, VRING_DESC_NEXT);
	}
	if (!write) {
		put(load, slot, i++, response);
	}
	for (uint32_t buffer = 0; buffer < load->buffers; buffer++) {
		put(load, slot, i++,
		    (struct vring_desc){.addr = addr,
					.len = load_buffer_bytes(load, buffer),
					.flags = write ? 0 : VRING_DESC_WRITE});
		addr += load->options.segment_size;
	}
	if (write) {
		put(load, slot, i++, response);
	}
	if (!queue->packed) {
		queue->avail->ring[queue->avail_idx & queue->mask] = slot->head;
		queue->avail_idx++;
	} else if (load->options.indirect) {
		front_packed_put(queue, slot->wire_addr + LOAD_SCSI_SLOT_SIZE,
				 (load->buffers + 2) * (uint32_t)sizeof(struct vring_packed_desc), slot->head,
				 VRING_DESC_INDIRECT);
	}
}

uint32_t load_scsi_status(const struct load_slot *slot)
{
	const struct scsi_command_response *response = &wire_of(slot)->response;

	if (response->response != RESPONSE_OK) {
		return LOAD_RESPONSE | response->response;
	}
	if (response->status == SCSI_GOOD && response->residual != 0) {
		return LOAD_RESPONSE | RESPONSE_OVERRUN;
	}
	return response->status;
}
