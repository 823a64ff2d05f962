/*
 * A request made by Python, one at a time: for whoever reads or writes a few blocks of a bdev outside the
 * data path of a queue.
 */
#ifndef BDEV_IO_H
#define BDEV_IO_H

#include "bdev/bdev.h"

/* cffi: begin */
struct bdev_buffer {
	void *address;
	uint64_t length;
};

/*
 * READ, WRITE and COMPARE cover exactly their buffers, COMPARE_AND_WRITE half of them: what to compare with
 * comes first. The length of the other operations is @length. NOTICE_DRAINED from @id, with the status as its
 * code, follows when the request has completed. The buffers stay until then, and so does the request, which
 * bdev_request_free() frees.
 */
struct bdev_request_setup {
	uint64_t id; /* source of the notice */
	uint32_t op; /* enum bdev_op */
	uint32_t flags;
	uint64_t offset;
	uint64_t length;
	const struct bdev_buffer *buffers;
	uint32_t count;
	uint64_t source;   /* of a COPY */
	uint64_t token[2]; /* of a COMPARE_AND_WRITE */
};

struct bdev_request;

/* Submit; it may have completed on return. NULL and errno: ENOMEM. */
struct bdev_request *bdev_request_start(struct bdev *bdev, const struct bdev_request_setup *setup);
bool bdev_request_done(const struct bdev_request *request);
/* Once done: 0 or -errno. */
int bdev_request_status(const struct bdev_request *request);
/* Ask for its end: as bdev_abort(), and -EALREADY when it is done. */
int bdev_request_abort(struct bdev_request *request);
/* Of a comparison that failed: the first byte that differs. */
uint64_t bdev_request_miscompare(const struct bdev_request *request);
/* Free a request that is done: 0, or -EBUSY (and nothing happens) when it is not. */
int bdev_request_free(struct bdev_request *request);
/* cffi: end */

#endif
