/*
 * Requests on files are carried out in pieces, one at a time; most have one. This is how a piece is made from
 * what is left of a request, and which shape it takes. No request is more than a system call takes: that is a
 * limit of the device.
 */
#ifndef BDEV_PIECE_H
#define BDEV_PIECE_H

#include "bdev/transfer.h"

#define PIECE_BOUNCE (128U << 10) /* bytes of a bounce buffer */

enum shape {
	/* All of it, straight from or into the caller's memory. */
	DIRECT,
	/*
	 * A part of the range, by way of an aligned buffer of our own: where the caller's memory is not aligned
	 * as O_DIRECT demands, and for all that remains after a short transfer.
	 */
	BOUNCE,
	/* fdatasync() or fallocate(), which have no parts. */
	WHOLE,
};

/* A request that is being carried out. */
struct transfer {
	struct file_op op; /* the piece that is under way */
	struct transfer *next;
	struct transfer_file *file;
	struct bdev_io *io;
	uint64_t done;	/* bytes */
	uint64_t piece; /* bytes */
	enum shape shape;
	uint8_t *bounce; /* held from the first BOUNCE piece to the end */
	bool aborted;	 /* the kernel was asked to cancel it */
};

/* The shape of a request's first piece. */
enum shape piece_shape(const struct transfer_file *file, const struct bdev_io *io);
/* Fill in transfer->op for the next piece. */
void piece_prepare(struct transfer *transfer);
/* Whether the file system can zero the range of this WRITE_ZEROES, as far as we know. */
bool piece_can_zero(const struct transfer_file *file, const struct bdev_io *io);
/* Whether it may do so by punching a hole, and can. */
bool piece_may_punch(const struct transfer_file *file, const struct bdev_io *io);

#endif
