/* Requests of virtio-blk, as its driver makes them: virtio 1.2, section 5.2.6. */
#include <endian.h>
#include <errno.h>

#include "vhost/initiator_internal.h"

#define SECTOR 512
#define UNMAP_FLAG 1 /* of a range that is zeroed */
#define NO_STATUS 0xff

enum { TYPE_IN = 0, TYPE_OUT = 1, TYPE_FLUSH = 4, TYPE_DISCARD = 11, TYPE_WRITE_ZEROES = 13 };
enum { STATUS_OK = 0, STATUS_UNSUPPORTED = 2 };

struct header {
	uint32_t type;
	uint32_t reserved;
	uint64_t sector;
};

struct range {
	uint64_t sector;
	uint32_t count;
	uint32_t flags;
};

static uint32_t ask_range(const struct bdev_io *io, struct range *range)
{
	bool zeroes = io->op == BDEV_WRITE_ZEROES;

	*range = (struct range){
	    .sector = htole64(io->offset / SECTOR),
	    .count = htole32((uint32_t)(io->length / SECTOR)),
	    .flags = htole32(zeroes && (io->flags & BDEV_IO_UNMAP) ? UNMAP_FLAG : 0),
	};
	return zeroes ? TYPE_WRITE_ZEROES : TYPE_DISCARD;
}

static uint32_t ask(struct initiator *disk, struct bounce_slot *slot, struct front_buffer *buffers)
{
	const struct bdev_io *io = slot->io;
	uint8_t *area = initiator_header(disk, slot);
	struct header *header = (struct header *)area;
	struct range *range = (struct range *)(header + 1);
	uint32_t count = 1;
	uint32_t type;

	buffers[0] = initiator_buffer(disk, header, sizeof(*header), false);
	if (initiator_is_flush(disk, slot)) {
		type = TYPE_FLUSH;
	} else if (bounce_has_data(&disk->bounce, io)) {
		type = io->op == BDEV_READ ? TYPE_IN : TYPE_OUT;
		buffers[count++] = initiator_buffer(disk, slot->buffer, io->length, type == TYPE_IN);
	} else {
		type = ask_range(io, range);
		buffers[count++] = initiator_buffer(disk, range, sizeof(*range), false);
	}
	*header = (struct header){.type = htole32(type)};
	if (type == TYPE_IN || type == TYPE_OUT) {
		header->sector = htole64(io->offset / SECTOR);
	}
	area[INITIATOR_ANSWER] = NO_STATUS;
	buffers[count++] = initiator_buffer(disk, area + INITIATOR_ANSWER, 1, true);
	return count;
}

static int answer(struct initiator *disk, struct bounce_slot *slot)
{
	switch (__atomic_load_n(initiator_header(disk, slot) + INITIATOR_ANSWER, __ATOMIC_RELAXED)) {
	case STATUS_OK:
		return 0;
	case STATUS_UNSUPPORTED:
		return -EOPNOTSUPP;
	default:
		return -EIO;
	}
}

const struct initiator_format initiator_blk = {.ask = ask, .answer = answer};
