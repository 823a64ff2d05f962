/* Parameter data: copied to Data-In, and out of Data-Out, however the initiator has cut them. */
#include "scsi/task.h"

void task_reply(struct scsi_task *task, const void *data, uint64_t length, uint64_t allocation)
{
	uint64_t left = length < allocation ? length : allocation;

	task->overrun = left > task->in_bytes;
	for (uint32_t i = 0; i < task->in_count && left > 0; i++) {
		uint64_t part = task->in[i].iov_len < left ? task->in[i].iov_len : left;

		memcpy(task->in[i].iov_base, (const uint8_t *)data + task->transferred, part);
		task->transferred += part;
		left -= part;
	}
	task_good(task);
}

void task_copy_out(const struct scsi_task *task, uint64_t offset, void *to, uint64_t length)
{
	for (uint32_t i = 0; i < task->out_count && length > 0; i++) {
		const struct iovec *iov = &task->out[i];
		uint64_t part;

		if (offset >= iov->iov_len) {
			offset -= iov->iov_len;
			continue;
		}
		part = iov->iov_len - offset < length ? iov->iov_len - offset : length;
		memcpy(to, (const uint8_t *)iov->iov_base + offset, part);
		to = (uint8_t *)to + part;
		length -= part;
		offset = 0;
	}
}

/* The initiator may change its memory meanwhile: then it is told that all was the same up to the end. */
static uint64_t first_difference(const uint8_t *a, const uint8_t *b, uint64_t length)
{
	uint64_t i = 0;

	while (i + 1 < length && a[i] == b[i]) {
		i++;
	}
	return i;
}

uint64_t task_compare_out(const struct scsi_task *task, uint64_t offset, const void *data, uint64_t length)
{
	uint64_t done = 0;

	for (uint32_t i = 0; i < task->out_count && done < length; i++) {
		const struct iovec *iov = &task->out[i];
		const uint8_t *ours = (const uint8_t *)data + done;
		const uint8_t *theirs = (const uint8_t *)iov->iov_base + offset;
		uint64_t part;

		if (offset >= iov->iov_len) {
			offset -= iov->iov_len;
			continue;
		}
		part = iov->iov_len - offset < length - done ? iov->iov_len - offset : length - done;
		if (memcmp(ours, theirs, part) != 0) {
			return done + first_difference(ours, theirs, part);
		}
		done += part;
		offset = 0;
	}
	return done;
}

bool task_list(struct scsi_task *task, uint64_t length)
{
	if (length > SCSI_BUFFER_SIZE) {
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_PARAMETER_LIST_LENGTH);
		return false;
	}
	if (length > task->out_bytes) {
		task->overrun = true;
		task_good(task);
		return false;
	}
	task_copy_out(task, 0, task->buffer, length);
	task->transferred = length;
	task->buffer_used = length > 4096;
	return true;
}
