#include "bdev/bounce.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bdev/detour.h"
#include "bdev/iov.h"

#define OP(op) (1U << (op))

static void release(struct bounce *bounce, struct bounce_slot *slot)
{
	slot->io = NULL;
	slot->next = bounce->free;
	bounce->free = slot;
}

static void begin(struct bounce *bounce, struct bdev_io *io)
{
	struct bounce_slot *slot = bounce->free;

	bounce->free = slot->next;
	slot->io = io;
	if (io->op == BDEV_WRITE && !bounce->untouched) {
		iov_copy(io, 0, slot->buffer, io->length);
	} else if (io->op == BDEV_WRITE_ZEROES && bounce_has_data(bounce, io)) {
		memset(slot->buffer, 0, io->length);
	}
	bounce->start(bounce, slot);
}

/* Begin what waits. What ends at once comes back here: one is enough. */
static void serve_waiting(struct bounce *bounce)
{
	if (bounce->serving) {
		return;
	}
	bounce->serving = true;
	while (bounce->waiting && bounce->free && !bounce->suspended) {
		struct bdev_io *io = bounce->waiting;

		bounce->waiting = io->next;
		if (!io->next) {
			bounce->waiting_end = &bounce->waiting;
		}
		begin(bounce, io);
	}
	bounce->serving = false;
}

void bounce_submit(struct bounce *bounce, struct bdev_io *io)
{
	if (bounce->free && !bounce->waiting && !bounce->suspended) {
		begin(bounce, io);
		serve_waiting(bounce); /* what came while all slots were in use, and this one has ended */
		return;
	}
	io->next = NULL;
	*bounce->waiting_end = io;
	bounce->waiting_end = &io->next;
}

void bounce_done(struct bounce *bounce, struct bounce_slot *slot, int status)
{
	struct bdev_io *io = slot->io;

	if (io->op == BDEV_READ && !status && !bounce->untouched) {
		iov_copy(io, 0, slot->buffer, io->length);
	}
	release(bounce, slot);
	bdev_complete(io, status);
	serve_waiting(bounce);
}

int bounce_abort(struct bounce *bounce, struct bdev_io *io)
{
	if (!detour_unlink(&bounce->waiting, &bounce->waiting_end, io)) {
		return -ENOTSUP;
	}
	bdev_complete(io, -ECANCELED);
	return 0;
}

void bounce_abandon(struct bounce *bounce, struct bounce_slot *slot, int status)
{
	struct bdev_io *io = slot->io;

	slot->io = NULL;
	bdev_complete(io, status);
}

void bounce_recover(struct bounce *bounce, struct bounce_slot *slot)
{
	release(bounce, slot);
	serve_waiting(bounce);
}

/* Put @io into the line where it would stand if it had never left. */
static void wait_again(struct bounce *bounce, struct bdev_io *io)
{
	struct bdev_io **link = &bounce->waiting;

	while (*link && (*link)->submitted <= io->submitted) {
		link = &(*link)->next;
	}
	io->next = *link;
	*link = io;
	if (!io->next) {
		bounce->waiting_end = &io->next;
	}
}

void bounce_suspend(struct bounce *bounce)
{
	bounce->suspended = true;
	for (uint32_t i = 0; i < bounce->count; i++) {
		struct bdev_io *io = bounce->slots[i].io;

		if (io) {
			release(bounce, &bounce->slots[i]);
			wait_again(bounce, io);
		}
	}
}

void bounce_resume(struct bounce *bounce, uint8_t *memory)
{
	for (uint32_t i = 0; i < bounce->count; i++) {
		bounce->slots[i].buffer = memory + (size_t)i * bounce->size;
	}
	bounce->suspended = false;
	serve_waiting(bounce);
}

uint64_t bounce_fail_waiting(struct bounce *bounce, uint64_t limit, int status)
{
	while (bounce->waiting && bounce->waiting->submitted < limit) {
		struct bdev_io *io = bounce->waiting;

		bounce->waiting = io->next;
		if (!io->next) {
			bounce->waiting_end = &bounce->waiting;
		}
		bdev_complete(io, status);
	}
	return bounce->waiting ? bounce->waiting->submitted : 0;
}

int bounce_init(struct bounce *bounce, uint8_t *memory, uint32_t count, uint32_t size, bool zeroes,
		void (*start)(struct bounce *bounce, struct bounce_slot *slot))
{
	*bounce = (struct bounce){
	    .start = start,
	    .slots = calloc(count, sizeof(struct bounce_slot)),
	    .count = count,
	    .size = size,
	    .suspended = !memory,
	    .with_data = OP(BDEV_READ) | OP(BDEV_WRITE) | (zeroes ? OP(BDEV_WRITE_ZEROES) : 0),
	};
	if (!bounce->slots) {
		return -ENOMEM;
	}
	bounce->waiting_end = &bounce->waiting;
	for (uint32_t i = count; i-- > 0;) {
		bounce->slots[i].index = i;
		bounce->slots[i].buffer = memory ? memory + (size_t)i * size : NULL;
		release(bounce, &bounce->slots[i]);
	}
	return 0;
}

int bounce_limit(const struct bounce *bounce, struct bdev *bdev, struct bdev_limits limits)
{
	for (unsigned op = 0; op < BDEV_OPS; op++) {
		if (bounce->with_data & OP(op)) {
			limits.bytes[op] = bounce->size;
		}
	}
	return bdev_set_limits(bdev, &limits);
}

void bounce_free(struct bounce *bounce)
{
	free(bounce->slots);
}
