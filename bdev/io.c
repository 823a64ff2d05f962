#include "bdev/io.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct bdev_request {
	struct bdev_io io;
	struct reactor *reactor;
	uint64_t id;
	int status;
	bool done;
	struct iovec iov[];
};

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

static void request_done(struct bdev_io *io, int status)
{
	struct bdev_request *request = container_of(io, struct bdev_request, io);

	request->status = status;
	request->done = true;
	reactor_notify(request->reactor, request->id, NOTICE_DRAINED, status, "%s",
		       status ? strerror(-status) : "done");
}

static bool has_data(uint32_t op)
{
	return op == BDEV_READ || op == BDEV_WRITE || op == BDEV_COMPARE || op == BDEV_COMPARE_AND_WRITE;
}

struct bdev_request *bdev_request_start(struct bdev *bdev, const struct bdev_request_setup *setup)
{
	struct bdev_request *request = calloc(1, sizeof(*request) + setup->count * sizeof(struct iovec));

	if (!request) {
		return NULL;
	}
	request->reactor = bdev->reactor;
	request->id = setup->id;
	request->io = (struct bdev_io){
	    .bdev = bdev,
	    .done = request_done,
	    .iov = request->iov,
	    .offset = setup->offset,
	    .length = setup->length,
	    .iovcnt = setup->count,
	    .op = (uint8_t)setup->op,
	    .flags = (uint8_t)setup->flags,
	    .source = setup->source,
	    .token = {setup->token[0], setup->token[1]},
	};
	if (has_data(setup->op)) {
		request->io.length = 0;
		for (uint32_t i = 0; i < setup->count; i++) {
			request->iov[i].iov_base = setup->buffers[i].address;
			request->iov[i].iov_len = setup->buffers[i].length;
			request->io.length += setup->buffers[i].length;
		}
		request->io.length /= setup->op == BDEV_COMPARE_AND_WRITE ? 2 : 1;
	}
	bdev_submit(&request->io);
	if (!request->done) {
		request->io.submitted = reactor_ticks(); /* between turns the reactor's own time stands still */
	}
	return request;
}

bool bdev_request_done(const struct bdev_request *request)
{
	return request->done;
}

int bdev_request_status(const struct bdev_request *request)
{
	return request->status;
}

int bdev_request_abort(struct bdev_request *request)
{
	return request->done ? -EALREADY : bdev_abort(&request->io);
}

uint64_t bdev_request_miscompare(const struct bdev_request *request)
{
	return request->io.miscompare;
}

int bdev_request_free(struct bdev_request *request)
{
	if (!request->done) {
		return -EBUSY;
	}
	free(request);
	return 0;
}
