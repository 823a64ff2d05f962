/* What the parts of the load generator share: slots, and the state of one load. */
#ifndef VHOST_WORKLOAD_INTERNAL_H
#define VHOST_WORKLOAD_INTERNAL_H

#include "vhost/workload.h"

#define LOAD_SECTOR 512
#define LOAD_LINE 64
#define LOAD_HEADER 16		   /* bytes of a request's header */
#define LOAD_SCSI_HEADER 51	   /* the same of virtio-scsi */
#define LOAD_NO_STATUS 0xff	   /* what we put where the device shall write its status */
#define LOAD_NO_STATUS_WRITTEN 256 /* how load_results calls that */
#define LOAD_NO_SLOT 0xffff

#define GENERATION_BUSY 0x80000000u    /* a request for the block is in flight */
#define GENERATION_UNKNOWN 0x7fffffffu /* a write failed: the block may hold anything */

/* virtio 1.2, section 5.2.6; the status byte is the device's. */
struct wire_request {
	uint32_t type;
	uint32_t reserved;
	uint64_t sector;
	uint8_t status;
	uint8_t padding[LOAD_SLOT_SIZE - 17];
};

_Static_assert(sizeof(struct wire_request) == LOAD_SLOT_SIZE, "a cache line");
_Static_assert(offsetof(struct wire_request, status) == 16, "virtio 5.2.6");

enum slot_kind {
	SLOT_READ = LOAD_READ,
	SLOT_WRITE = LOAD_WRITE,
	SLOT_READ_BACK, /* of a block just written, to verify it */
	SLOT_FREE,
};

struct load_slot {
	uint64_t started; /* ticks */
	uint64_t block;
	struct wire_request *wire;
	union { /* descriptors of the data, laid out before */
		struct vring_desc *buffers;
		struct vring_packed_desc *packed_table; /* of a packed ring: only in an indirect table */
	};
	uint64_t wire_addr;
	uint64_t data_addr;
	uint8_t *data;
	uint16_t head;
	uint8_t kind; /* enum slot_kind */
	uint32_t generation;
} __attribute__((aligned(LOAD_LINE)));

enum load_stopping { GO_ON, STOP_SOON, STOP_NOW };

enum load_phase { LOAD_RUNNING, LOAD_DRAINING, LOAD_ENDED };

struct load {
	struct front_queue *queue;
	struct load_slot *slots;
	uint16_t *slot_of_head;
	uint16_t *free; /* a stack */
	uint32_t free_count;
	uint32_t in_flight;
	uint32_t buffers; /* data descriptors a request */
	enum load_phase phase;
	struct load_options options;
	uint64_t blocks;
	uint64_t cursor; /* next block in sequence */
	uint64_t random;
	uint64_t issued; /* of those asked for */
	uint64_t sent;	 /* with those to read back */
	uint64_t due;	 /* ticks, of the next request of an open loop */
	uint64_t last_progress;
	uint32_t generation;
	uint32_t *generations; /* by block: the last write, with GENERATION_BUSY; NULL when not verifying */
	int failure;
	uint8_t stop; /* enum load_stopping */
	struct load_results results;
};

static inline uint64_t load_slot_offset(const struct load *load, const struct load_slot *slot)
{
	return load->options.offset + slot->block * load->options.block_size;
}

/* Packed rings: put a slot's request into the ring; its kind, header and data are there. */
void load_issue_packed(struct load *load, struct load_slot *slot);
/* Lay out an indirect table, which begins after the slot's header. */
void load_lay_out_packed(struct load *load, struct load_slot *slot);
/* Of a virtio-scsi device: what stays in a slot; a request; and how it ended. */
void load_lay_out_scsi(const struct load *load, struct load_slot *slot, uint32_t index);
void load_issue_scsi(struct load *load, struct load_slot *slot);
uint32_t load_scsi_status(const struct load_slot *slot);

/* Bytes of header and status of a slot. */
static inline uint32_t load_wire_bytes(const struct load_options *options)
{
	return options->scsi ? LOAD_SCSI_SLOT_SIZE : LOAD_SLOT_SIZE;
}

/* Bytes of data buffer @i of a request. */
static inline uint32_t load_buffer_bytes(const struct load *load, uint32_t i)
{
	const struct load_options *options = &load->options;

	return i + 1 < load->buffers ? options->segment_size : options->block_size - i * options->segment_size;
}

/* Before a slot's request goes out: fill what it writes, or spoil what it reads. */
void load_prepare_data(struct load *load, struct load_slot *slot);
/* What a slot has read must be what was written last. */
void load_check_data(struct load *load, const struct load_slot *slot);

#endif
