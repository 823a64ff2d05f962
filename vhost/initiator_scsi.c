/* Commands to a logical unit of virtio-scsi: virtio 1.2, section 5.6.6.1; SBC-4 for the commands. */
#include <endian.h>
#include <errno.h>
#include <string.h>

#include "vhost/initiator_internal.h"

#define ATTEMPTS 16
#define CDB_SIZE 32
#define SENSE_SIZE 96
#define PARAMETERS 128 /* where in a header the parameter list of UNMAP stands */

enum { READ_16 = 0x88, WRITE_16 = 0x8a, SYNCHRONIZE_CACHE_16 = 0x91, UNMAP = 0x42 };
enum { RESPONSE_OK = 0, RESPONSE_ABORTED = 2, RESPONSE_RESET = 4, RESPONSE_BUSY = 5 };
enum { GOOD = 0x00, CHECK_CONDITION = 0x02, BUSY = 0x08, TASK_SET_FULL = 0x28 };
enum { UNIT_ATTENTION = 0x6, DATA_PROTECT = 0x7 };

struct command {
	uint8_t lun[8];
	uint64_t id;
	uint8_t task_attribute;
	uint8_t priority;
	uint8_t crn;
	uint8_t cdb[CDB_SIZE];
} __attribute__((packed));

struct response {
	uint32_t sense_length;
	uint32_t residual;
	uint16_t status_qualifier;
	uint8_t status;
	uint8_t response;
	uint8_t sense[SENSE_SIZE];
} __attribute__((packed));

_Static_assert(sizeof(struct command) <= PARAMETERS && PARAMETERS + 24 <= INITIATOR_ANSWER &&
		   INITIATOR_ANSWER + sizeof(struct response) <= INITIATOR_HEADER,
	       "what is asked and the answer have room in a header");

static void put_be16(uint8_t *at, uint16_t value)
{
	value = htobe16(value);
	memcpy(at, &value, sizeof(value));
}

static void put_be32(uint8_t *at, uint32_t value)
{
	value = htobe32(value);
	memcpy(at, &value, sizeof(value));
}

static void put_be64(uint8_t *at, uint64_t value)
{
	value = htobe64(value);
	memcpy(at, &value, sizeof(value));
}

/* READ (16), WRITE (16): SBC-4, sections 5.18 and 5.41. */
static void ask_transfer(const struct initiator *disk, const struct bdev_io *io, uint8_t *cdb)
{
	cdb[0] = io->op == BDEV_READ ? READ_16 : WRITE_16;
	put_be64(cdb + 2, io->offset / disk->setup.block_size);
	put_be32(cdb + 10, (uint32_t)(io->length / disk->setup.block_size));
}

/* UNMAP of one range: SBC-4, section 5.35. */
static void ask_unmap(const struct initiator *disk, const struct bdev_io *io, uint8_t *cdb, uint8_t *parameters)
{
	cdb[0] = UNMAP;
	put_be16(cdb + 7, 24);
	memset(parameters, 0, 24);
	put_be16(parameters, 22);     /* bytes that follow these */
	put_be16(parameters + 2, 16); /* bytes of descriptors */
	put_be64(parameters + 8, io->offset / disk->setup.block_size);
	put_be32(parameters + 16, (uint32_t)(io->length / disk->setup.block_size));
}

static uint32_t ask(struct initiator *disk, struct bounce_slot *slot, struct front_buffer *buffers)
{
	uint8_t *area = initiator_header(disk, slot);
	struct command *command = (struct command *)area;
	struct front_buffer answer =
	    initiator_buffer(disk, area + INITIATOR_ANSWER, sizeof(struct response), true);

	/* One level of addressing: a bus, a target, and a unit of flat space (section 5.6.6.1). */
	*command = (struct command){
	    .lun = {1, (uint8_t)disk->setup.target, (uint8_t)(0x40 | disk->setup.lun >> 8),
		    (uint8_t)disk->setup.lun},
	    .id = htole64(slot->index),
	};
	memset(area + INITIATOR_ANSWER, 0xff, sizeof(struct response));
	buffers[0] = initiator_buffer(disk, command, sizeof(*command), false);
	if (initiator_is_flush(disk, slot)) {
		command->cdb[0] = SYNCHRONIZE_CACHE_16;
		buffers[1] = answer;
		return 2;
	}
	if (slot->io->op == BDEV_UNMAP) {
		ask_unmap(disk, slot->io, command->cdb, area + PARAMETERS);
		buffers[1] = initiator_buffer(disk, area + PARAMETERS, 24, false);
		buffers[2] = answer;
		return 3;
	}
	ask_transfer(disk, slot->io, command->cdb);
	if (slot->io->op == BDEV_READ) {
		buffers[1] = answer;
		buffers[2] = initiator_buffer(disk, slot->buffer, slot->io->length, true);
	} else {
		buffers[1] = initiator_buffer(disk, slot->buffer, slot->io->length, false);
		buffers[2] = answer;
	}
	return 3;
}

static int again(struct initiator *disk, const struct bounce_slot *slot, int how)
{
	return disk->attempts[slot->index]++ < ATTEMPTS ? how : -EIO;
}

/* SPC-5, section 4.4: the sense key stands in byte 1 of descriptor format, in byte 2 of fixed format. */
static int explain_sense(struct initiator *disk, const struct bounce_slot *slot,
			 const struct response *response)
{
	uint8_t code = response->sense[0] & 0x7f;
	uint8_t key = response->sense[code >= 0x72 ? 1 : 2] & 0xf;

	switch (key) {
	case UNIT_ATTENTION: /* something has happened before: nothing was done */
		return again(disk, slot, INITIATOR_AGAIN);
	case DATA_PROTECT:
		return -EROFS;
	default:
		return -EIO;
	}
}

static int answer(struct initiator *disk, struct bounce_slot *slot)
{
	struct response response;

	memcpy(&response, initiator_header(disk, slot) + INITIATOR_ANSWER, sizeof(response));
	switch (response.response) {
	case RESPONSE_OK:
		break;
	case RESPONSE_ABORTED:
	case RESPONSE_RESET:
		return again(disk, slot, INITIATOR_AGAIN);
	case RESPONSE_BUSY:
		return again(disk, slot, INITIATOR_LATER);
	default:
		return -EIO;
	}
	switch (response.status) {
	case GOOD:
		return response.residual ? -EIO : 0;
	case CHECK_CONDITION:
		return explain_sense(disk, slot, &response);
	case BUSY:
	case TASK_SET_FULL:
		return again(disk, slot, INITIATOR_LATER);
	default:
		return -EIO;
	}
}

const struct initiator_format initiator_scsi = {.ask = ask, .answer = answer};
