/* UNMAP and WRITE SAME: SBC-4 sections 5.35 and 5.46 to 5.49. */
#include "scsi/commands.h"
#include "scsi/limits.h"
#include "scsi/task.h"

/* --- UNMAP: one range after another ------------------------------------------------------------------ */

#define LIST_HEADER 8
#define RANGE_SIZE 16

/* task->position is the offset of the next descriptor, task->length the end of the list. */
static void next_range(struct scsi_task *task)
{
	uint32_t block_size = unit_block_size(task->unit);

	while (task->position < task->length && !task->aborted) {
		const uint8_t *range = task->buffer + task->position;
		uint32_t blocks = get_be32(range + 8);

		task->position += RANGE_SIZE;
		if (blocks != 0) {
			task_submit(task, BDEV_UNMAP, get_be64(range) * block_size,
				    (uint64_t)blocks * block_size, next_range);
			return;
		}
	}
	task_good(task);
}

/* Nothing is unmapped unless all of the list can be. */
static bool check_ranges(struct scsi_task *task, unsigned count)
{
	uint64_t total = 0;

	if (count > SCSI_MAX_UNMAP_RANGES) {
		task_bad_list(task, 2, -1);
		return false;
	}
	for (unsigned i = 0; i < count; i++) {
		const uint8_t *range = task->buffer + LIST_HEADER + i * RANGE_SIZE;

		total += get_be32(range + 8);
		if (!task_check_range(task, get_be64(range), get_be32(range + 8))) {
			return false;
		}
	}
	if (total > SCSI_MAX_UNMAP_BLOCKS) {
		task_bad_list(task, LIST_HEADER + 8, -1);
		return false;
	}
	return true;
}

void run_unmap(struct scsi_task *task)
{
	uint16_t length = get_be16(task->cdb + 7);
	unsigned count;

	if (!unit_can_unmap(task->unit)) {
		if (task_check_writable(task)) {
			task_sense(task, KEY_ILLEGAL_REQUEST, ASC_INVALID_OPCODE);
		}
		return;
	}
	if (!task_check_writable(task) || !task_list(task, length)) {
		return;
	}
	if (length == 0) {
		task_good(task);
		return;
	}
	if (length < LIST_HEADER) {
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_PARAMETER_LIST_LENGTH);
		return;
	}
	/* What is not a whole descriptor, or lies past the list's own length, is ignored (section 5.35.2). */
	count = get_be16(task->buffer + 2) / RANGE_SIZE;
	if (count > (length - LIST_HEADER) / (unsigned)RANGE_SIZE) {
		count = (length - LIST_HEADER) / RANGE_SIZE;
	}
	if (check_ranges(task, count)) {
		task->position = LIST_HEADER;
		task->length = LIST_HEADER + (uint64_t)count * RANGE_SIZE;
		next_range(task);
	}
}

/* --- WRITE SAME -------------------------------------------------------------------------------------- */

#define SAME_UNMAP 0x08
#define SAME_ANCHOR 0x10
#define SAME_NDOB 0x01

static uint8_t same_flags(const struct scsi_task *task)
{
	return task->unit->write_cache ? 0 : BDEV_IO_FUA;
}

/* Write the pattern in task->buffer, as much at once as it holds. */
static void write_pattern(struct scsi_task *task)
{
	uint32_t block_size = unit_block_size(task->unit);
	uint64_t room = SCSI_BUFFER_SIZE / block_size;
	uint64_t blocks = task->blocks - task->position;
	uint64_t lba = task->lba + task->position;

	if (blocks == 0 || task->aborted) {
		task_good(task);
		return;
	}
	blocks = blocks < room ? blocks : room;
	task->position += blocks;
	task->io.flags = same_flags(task);
	task_submit_buffer(task, BDEV_WRITE, lba * block_size, task->buffer, blocks * block_size,
			   write_pattern);
}

static bool is_zero(const uint8_t *data, uint32_t length)
{
	return data[0] == 0 && memcmp(data, data + 1, length - 1) == 0;
}

static void start_pattern(struct scsi_task *task, uint32_t block_size)
{
	uint64_t size = task->blocks * block_size;

	size = size < SCSI_BUFFER_SIZE ? size : SCSI_BUFFER_SIZE;
	for (uint64_t at = block_size; at + block_size <= size; at += block_size) {
		memcpy(task->buffer + at, task->buffer, block_size);
	}
	write_pattern(task);
}

static void start_zeroes(struct scsi_task *task, bool unmap, uint32_t block_size)
{
	if (!(task->unit->bdev->supported & 1u << BDEV_WRITE_ZEROES)) {
		memset(task->buffer, 0, block_size);
		start_pattern(task, block_size);
		return;
	}
	task->io.flags = same_flags(task) | (unmap ? BDEV_IO_UNMAP : 0);
	task_submit(task, BDEV_WRITE_ZEROES, task->lba * block_size, task->blocks * block_size, task_good);
}

static void write_same(struct scsi_task *task, unsigned length_byte, bool no_data)
{
	uint32_t block_size = unit_block_size(task->unit);
	bool unmap = task->cdb[1] & SAME_UNMAP;

	if (task->cdb[1] & SAME_ANCHOR) {
		task_bad_cdb(task, 1, 4);
		return;
	}
	if (unmap && !unit_can_unmap(task->unit) && !task->unit->write_protect) {
		task_bad_cdb(task, 1, 3);
		return;
	}
	if (task->blocks == 0 || task->blocks > SCSI_MAX_SAME_BLOCKS) {
		task_bad_cdb(task, length_byte, 7); /* WSNZ, MAXIMUM WRITE SAME LENGTH */
		return;
	}
	if (!task_check_writable(task) || !task_check_range(task, task->lba, task->blocks)) {
		return;
	}
	if (!no_data && !task_list(task, block_size)) {
		return;
	}
	if (no_data || is_zero(task->buffer, block_size)) {
		start_zeroes(task, unmap, block_size);
	} else {
		start_pattern(task, block_size);
	}
}

void run_write_same_10(struct scsi_task *task)
{
	task->lba = get_be32(task->cdb + 2);
	task->blocks = get_be16(task->cdb + 7);
	write_same(task, 7, false);
}

void run_write_same_16(struct scsi_task *task)
{
	task->lba = get_be64(task->cdb + 2);
	task->blocks = get_be32(task->cdb + 10);
	write_same(task, 10, task->cdb[1] & SAME_NDOB);
}
