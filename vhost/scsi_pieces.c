/*
 * Commands whose driver has cut header or response in other places than after each of them (virtio 1.2, section
 * 2.7.4.1): few do, so this is apart from scsi.c. And what a migration is told of any command.
 */
#include <string.h>

#include "vhost/ring.h"
#include "vhost/scsi.h"

_Static_assert(sizeof(struct scsi_extra) % 4096 == 0, "buffers are whole pages");

static struct scsi_extra *extra_of(const struct scsi_request *request)
{
	return queue_request_extra(&request->base);
}

const uint8_t *scsi_take_header_pieces(struct scsi_request *request)
{
	uint8_t *header = extra_of(request)->header;
	struct vq_chain *chain = &request->base.chain;

	if (chain->readable_bytes < SCSI_HEADER_SIZE) {
		return NULL;
	}
	chain_take(chain, header, SCSI_HEADER_SIZE);
	return header;
}

void scsi_take_response_pieces(struct scsi_request *request)
{
	struct iovec *pieces = extra_of(request)->response;
	struct scsi_task *task = &request->task;
	size_t left = SCSI_RESPONSE_SIZE;

	request->response = task->in->iov_len > SCSI_RESPONSE_SIZE ? task->in->iov_base : NULL;
	while (left > 0) {
		struct iovec *first = task->in;
		size_t part = first->iov_len < left ? first->iov_len : left;

		if (part > 0) {
			*pieces++ = (struct iovec){.iov_base = first->iov_base, .iov_len = part};
		}
		first->iov_base = (char *)first->iov_base + part;
		first->iov_len -= part;
		left -= part;
		if (first->iov_len == 0) {
			task->in++;
			task->in_count--;
		}
	}
}

void scsi_put_pieces(const struct scsi_request *request, const void *response, size_t size)
{
	const struct iovec *iov = extra_of(request)->response;

	for (size_t done = 0; done < size; iov++) {
		size_t part = iov->iov_len < size - done ? iov->iov_len : size - done;

		memcpy(iov->iov_base, (const uint8_t *)response + done, part);
		done += part;
	}
}

void scsi_log_written(struct scsi_request *request)
{
	const struct iovec *piece = extra_of(request)->response;

	/* The chain's writable part begins with the response, unless that was cut off a longer buffer. */
	queue_log_written(&request->base, SCSI_RESPONSE_SIZE + request->task.in_bytes, request->response,
			  SCSI_RESPONSE_SIZE);
	for (size_t size = 0; request->response == NULL && size < SCSI_RESPONSE_SIZE;
	     size += piece++->iov_len) {
		queue_log_written(&request->base, 0, piece->iov_base, piece->iov_len);
	}
}
