#include "scsi/exec.h"

#include <errno.h>
#include <stdlib.h>

struct scsi_exec {
	struct scsi_task task;
	struct reactor *reactor;
	uint64_t id;
	bool done;
	struct iovec *iov;
	uint8_t buffer[SCSI_BUFFER_SIZE];
};

static void exec_done(struct scsi_task *task)
{
	struct scsi_exec *exec = (struct scsi_exec *)((char *)task - offsetof(struct scsi_exec, task));

	exec->done = true;
	reactor_notify(exec->reactor, exec->id, NOTICE_DRAINED, 0, "done");
}

static uint64_t fill(struct iovec *iov, const struct scsi_buffer *buffers, uint32_t count)
{
	uint64_t bytes = 0;

	for (uint32_t i = 0; i < count; i++) {
		iov[i] = (struct iovec){.iov_base = buffers[i].address, .iov_len = buffers[i].length};
		bytes += buffers[i].length;
	}
	return bytes;
}

struct scsi_exec *scsi_exec_start(struct reactor *reactor, struct scsi_target *target,
				  const struct scsi_exec_setup *setup)
{
	struct scsi_exec *exec = calloc(1, sizeof(*exec));
	struct scsi_task *task;

	if (exec == NULL) {
		return NULL;
	}
	exec->iov = calloc((size_t)setup->out_count + setup->in_count + 1, sizeof(*exec->iov));
	if (exec->iov == NULL) {
		free(exec);
		return NULL;
	}
	exec->reactor = reactor;
	exec->id = setup->id;
	task = &exec->task;
	task->target = target;
	task->unit = setup->lun < SCSI_MAX_UNITS ? target->units[setup->lun] : NULL;
	task->well_known = setup->lun == SCSI_MAX_UNITS;
	task->done = exec_done;
	memcpy(task->cdb, setup->cdb, sizeof(task->cdb));
	task->attribute = setup->attribute;
	task->tag = setup->tag;
	task->again = setup->again;
	task->buffer = exec->buffer;
	task->out = exec->iov;
	task->out_count = setup->out_count;
	task->out_bytes = fill(task->out, setup->out, setup->out_count);
	task->in = exec->iov + setup->out_count;
	task->in_count = setup->in_count;
	task->in_bytes = fill(task->in, setup->in, setup->in_count);
	scsi_task_start(task);
	return exec;
}

bool scsi_exec_done(const struct scsi_exec *exec)
{
	return exec->done;
}

void scsi_exec_outcome(const struct scsi_exec *exec, struct scsi_outcome *outcome)
{
	const struct scsi_task *task = &exec->task;

	*outcome = (struct scsi_outcome){
	    .status = task->status,
	    .sense_length = task->sense_length,
	    .overrun = task->overrun,
	    .transferred = task->transferred,
	};
	memcpy(outcome->sense, task->sense, sizeof(outcome->sense));
}

int scsi_exec_free(struct scsi_exec *exec)
{
	if (!exec->done) {
		return -EBUSY;
	}
	free(exec->iov);
	free(exec);
	return 0;
}
