/*
 * What it takes to carry out one request on a file: alignment, short transfers and their continuation, and the
 * fixed pools that this draws on.
 *
 * There is one engine a reactor and way to the kernel, shared by all files that go that way. Requests that find
 * a pool dry wait in line.
 */
#ifndef BDEV_TRANSFER_H
#define BDEV_TRANSFER_H

#include "bdev/bdev.h"
#include "bdev/kernel_io.h"

struct engine;

/* A file as transfers need to know it. */
struct transfer_file {
	struct io_file io;
	struct engine *engine;
	uint32_t memory_alignment; /* of addresses and lengths of buffers; 1 without O_DIRECT */
	uint32_t offset_alignment; /* of offsets and lengths in the file; 1 without O_DIRECT */
	bool punch_hole;	   /* fallocate(FALLOC_FL_PUNCH_HOLE) works, as far as we know */
	bool zero_range;	   /* fallocate(FALLOC_FL_ZERO_RANGE) works, as far as we know */
};

/* An engine of @reactor, made at the first call; one reference is the caller's. NULL and errno. */
struct engine *engine_get(struct reactor *reactor, enum kernel_io_kind kind);
/* The last one destroys it; no request may be left. */
void engine_put(struct engine *engine);

/* As file_buffer_add(), file_buffer_remove() and file_buffer_uses(). */
int engine_add_buffer(struct reactor *reactor, void *address, uint64_t size);
int engine_remove_buffer(struct reactor *reactor, const void *address);
uint64_t engine_buffer_uses(const struct reactor *reactor);

void engine_add_file(struct engine *engine, struct transfer_file *file, int fd);
void engine_remove_file(struct engine *engine, struct transfer_file *file);

/* Carry out any request but a RESET; ends in bdev_complete(). */
void transfer_start(struct transfer_file *file, struct bdev_io *io);
/* Try to end a request before its time, as bdev_abort() says. */
int transfer_abort(struct transfer_file *file, struct bdev_io *io);

#endif
