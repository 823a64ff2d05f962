/*
 * EXTENDED COPY with a list identifier of one byte (SPC-5 section 6.6), block to block. The copy manager is in
 * every unit, and copies among the units that the same initiator reaches through the same controller: it finds
 * them by what VPD page 83h says of them. Data goes through the task's buffer, a part at a time; before each
 * part it looks again whether both units let this initiator.
 */
#include "scsi/copy.h"

#include "scsi/commands.h"
#include "scsi/fence.h"
#include "scsi/sense.h"
#include "scsi/task.h"

#define HEADER 16
#define LIST_ROOM 8192 /* the list at the front of the task's buffer, then the state, then data */
#define STATE_ROOM 4096
#define DATA_ROOM (SCSI_BUFFER_SIZE - LIST_ROOM - STATE_ROOM)

enum {
	USAGE_HOLD = 0,
	USAGE_RESERVED = 1,
	USAGE_DISABLE = 3,
	SEGMENT_DESTINATION_COUNT = 0x02, /* DC: blocks of the destination */
};

struct copy {
	struct scsi_unit *cscds[COPY_MAX_CSCDS]; /* NULL: this initiator reaches no such unit */
	uint32_t segments;
	uint32_t segment; /* the present one */
	const uint8_t *list;
	struct scsi_unit *from;
	struct scsi_unit *to;
	uint64_t source; /* bytes */
	uint64_t destination;
	uint64_t left;
	uint32_t part;	/* under way */
	uint64_t moved; /* in all */
	bool recorded;	/* for RECEIVE COPY RESULTS */
};

_Static_assert(HEADER + COPY_MAX_LIST <= LIST_ROOM, "a list fits");
_Static_assert(sizeof(struct copy) <= STATE_ROOM, "the state fits");

static struct copy *copy_of(const struct scsi_task *task)
{
	return (struct copy *)(void *)(task->buffer + LIST_ROOM);
}

static uint8_t *data_of(const struct scsi_task *task)
{
	return task->buffer + LIST_ROOM + STATE_ROOM;
}

/* --- the end ---------------------------------------------------------------------------------------- */

static void record(struct scsi_task *task, enum scsi_copy_status status, const uint8_t *sense, uint8_t length)
{
	const struct copy *copy = copy_of(task);
	struct scsi_copy_result result = {
	    .list = task->buffer[0],
	    .status = (uint8_t)status,
	    .segments = (uint16_t)copy->segment,
	    .moved = copy->moved,
	    .sense_length = length,
	};

	if (copy->recorded) {
		if (length > 0) {
			memcpy(result.sense, sense, length);
		}
		shared_lock(task->unit->shared);
		task->unit->shared->copies[task->unit->nexus] = result;
		shared_unlock(task->unit->shared);
	}
}

/* COPY ABORTED, in the present segment; @field of its descriptor is at fault, or none (-1). */
static void fail(struct scsi_task *task, enum scsi_asc asc, int field)
{
	uint8_t held[SCSI_SENSE_SIZE];
	struct sense sense = {
	    .key = KEY_COPY_ABORTED,
	    .asc = (uint16_t)asc,
	    .has_command_specific = true,
	    .command_specific = copy_of(task)->segment,
	    .has_specific = field >= 0,
	    .specific = {0xa0, 0, (uint8_t)field}, /* SKSV; SD: of the segment descriptor */
	};

	record(task, COPY_FAILED, held, sense_write(&sense, false, held));
	task_fail(task, &sense);
}

/* --- segments ------------------------------------------------------------------------------------------ */

static void next_segment(struct scsi_task *task);
static void read_part(struct scsi_task *task);

static void leave(struct scsi_unit *unit)
{
	unit->held--;
}

static void enter(struct scsi_unit *unit)
{
	unit->held++;
}

/* The units of a segment stay while it is copied, and PREEMPT AND ABORT of the destination waits for us. */
static void begin_segment(struct copy *copy)
{
	enter(copy->from);
	enter(copy->to);
	fence_begin(copy->to);
}

static void end_segment(struct copy *copy)
{
	fence_end(copy->to);
	leave(copy->to);
	leave(copy->from);
}

static void abort_segment(struct scsi_task *task, enum scsi_asc asc, int field)
{
	end_segment(copy_of(task));
	fail(task, asc, field);
}

static void part_failed(struct scsi_task *task)
{
	abort_segment(task, ASC_THIRD_PARTY_FAILURE, -1);
}

static void part_written(struct scsi_task *task)
{
	struct copy *copy = copy_of(task);

	copy->source += copy->part;
	copy->destination += copy->part;
	copy->left -= copy->part;
	copy->moved += copy->part;
	read_part(task);
}

static void write_part(struct scsi_task *task)
{
	struct copy *copy = copy_of(task);

	task->io.flags = copy->to->write_cache ? 0 : BDEV_IO_FUA;
	task_submit_to(task, copy->to, BDEV_WRITE, copy->destination, data_of(task), copy->part, part_written);
}

/* Does the unit let this initiator, as things are now? */
static bool is_allowed(struct scsi_unit *unit, enum scsi_access access)
{
	if (unit->bdev == NULL) {
		return false;
	}
	if (atomic_load_explicit(&unit->shared->generation, memory_order_acquire) != unit->generation) {
		unit_refresh(unit);
	}
	return access <= unit->reserved && !unit->stopped &&
	       (access < ACCESS_CHANGE || !(unit->write_protect || unit->bdev->readonly));
}

static void read_part(struct scsi_task *task)
{
	struct copy *copy = copy_of(task);

	if (task->aborted) {
		end_segment(copy);
		task_good(task);
	} else if (copy->left == 0) {
		end_segment(copy);
		copy->segment++;
		next_segment(task);
	} else if (!is_allowed(copy->from, ACCESS_READ) || !is_allowed(copy->to, ACCESS_CHANGE)) {
		abort_segment(task, ASC_THIRD_PARTY_FAILURE, -1);
	} else {
		copy->part = copy->left < DATA_ROOM ? (uint32_t)copy->left : DATA_ROOM;
		copy->part -= copy->part % unit_block_size(copy->to);
		copy->part -= copy->part % unit_block_size(copy->from);
		task->io.flags = 0;
		task_submit_to(task, copy->from, BDEV_READ, copy->source, data_of(task), copy->part,
			       write_part);
	}
}

static bool is_inside(const struct scsi_unit *unit, uint64_t lba, uint64_t bytes)
{
	uint64_t blocks = unit_blocks(unit);

	return lba <= blocks && bytes / unit_block_size(unit) <= blocks - lba;
}

/* The unit of a CSCD index in the descriptor, or NULL and the task has ended. */
static struct scsi_unit *find_cscd(struct scsi_task *task, const uint8_t *segment, unsigned at)
{
	uint16_t index = get_be16(segment + at);
	struct scsi_unit *unit = index < COPY_MAX_CSCDS ? copy_of(task)->cscds[index] : NULL;

	if (unit == NULL || unit->bdev == NULL) {
		fail(task, ASC_UNREACHABLE_COPY_TARGET, (int)at);
		return NULL;
	}
	return unit;
}

static void next_segment(struct scsi_task *task)
{
	struct copy *copy = copy_of(task);
	const uint8_t *segment = copy->list + copy->segment * COPY_SEGMENT_SIZE;
	uint64_t from, to, blocks;

	if (copy->segment == copy->segments || task->aborted) {
		record(task, COPY_DONE, NULL, 0);
		task_good(task);
		return;
	}
	copy->from = find_cscd(task, segment, 4);
	if (copy->from == NULL) {
		return;
	}
	copy->to = find_cscd(task, segment, 6);
	if (copy->to == NULL) {
		return;
	}
	blocks = get_be16(segment + 10);
	from = get_be64(segment + 12);
	to = get_be64(segment + 20);
	copy->left = blocks * unit_block_size(segment[1] & SEGMENT_DESTINATION_COUNT ? copy->to : copy->from);
	if (copy->left % unit_block_size(copy->from) != 0 || copy->left % unit_block_size(copy->to) != 0) {
		fail(task, ASC_INEXACT_SEGMENT, 10);
	} else if (!is_inside(copy->from, from, copy->left)) {
		fail(task, ASC_NONE, 12);
	} else if (!is_inside(copy->to, to, copy->left)) {
		fail(task, ASC_NONE, 20);
	} else {
		copy->source = from * unit_block_size(copy->from);
		copy->destination = to * unit_block_size(copy->to);
		begin_segment(copy);
		read_part(task);
	}
}

/* --- the parameter list -------------------------------------------------------------------------------- */

static struct scsi_unit *find_in(const struct scsi_target *target, const uint8_t *descriptor)
{
	for (unsigned lun = 0; target != NULL && lun < SCSI_MAX_UNITS; lun++) {
		struct scsi_unit *unit = target->units[lun];

		if (unit != NULL && unit->bdev != NULL && unit_is_called(unit, descriptor + 4)) {
			return unit;
		}
	}
	return NULL;
}

static struct scsi_unit *find_unit(const struct scsi_task *task, const uint8_t *descriptor)
{
	struct scsi_unit *unit = find_in(task->target, descriptor);

	for (uint32_t i = 0; unit == NULL && i < task->target->peer_count; i++) {
		unit = find_in(task->target->peers[i], descriptor);
	}
	return unit;
}

static int check_cscd(struct copy *copy, const struct scsi_task *task, uint32_t index, const uint8_t *cscd)
{
	uint32_t block = get_be24(cscd + 29);
	struct scsi_unit *unit;

	if (cscd[7] > 20) {
		return 7;
	}
	unit = copy->cscds[index] = find_unit(task, cscd);
	return unit != NULL && block != 0 && block != unit_block_size(unit) ? 29 : -1;
}

/*
 * Look at @cscds bytes of CSCD descriptors and @segments bytes of segment descriptors: the place of what cannot
 * be, with *@asc; or -1. A type that is not known comes first: nobody knows how long such a descriptor is.
 */
static int check_descriptors(struct scsi_task *task, uint32_t cscds, uint32_t segments, enum scsi_asc *asc)
{
	struct copy *copy = copy_of(task);
	const uint8_t *list = task->buffer;

	for (uint32_t at = HEADER; at < HEADER + cscds; at += COPY_CSCD_SIZE) {
		int wrong;

		*asc = list[at] == COPY_IDENTIFICATION ? ASC_INVALID_FIELD_IN_LIST : ASC_UNSUPPORTED_CSCD;
		if (*asc == ASC_UNSUPPORTED_CSCD) {
			return (int)at;
		}
		if (at + COPY_CSCD_SIZE > HEADER + cscds) {
			return 2;
		}
		wrong = check_cscd(copy, task, (at - HEADER) / COPY_CSCD_SIZE, list + at);
		if (wrong >= 0) {
			return (int)at + wrong;
		}
	}
	copy->list = list + HEADER + cscds;
	for (uint32_t at = HEADER + cscds; at < HEADER + cscds + segments; at += COPY_SEGMENT_SIZE) {
		*asc = list[at] == COPY_BLOCK_TO_BLOCK ? ASC_INVALID_FIELD_IN_LIST : ASC_UNSUPPORTED_SEGMENT;
		if (*asc == ASC_UNSUPPORTED_SEGMENT) {
			return (int)at;
		}
		if (at + COPY_SEGMENT_SIZE > HEADER + cscds + segments) {
			return 8;
		}
		if (get_be16(list + at + 2) != COPY_SEGMENT_SIZE - 4) {
			return (int)at + 2;
		}
	}
	return -1;
}

static bool refuse(struct scsi_task *task, enum scsi_asc asc)
{
	task_sense(task, KEY_ILLEGAL_REQUEST, asc);
	return false;
}

/* Is the list one that we take? If not the task has ended. */
static bool check_list(struct scsi_task *task, uint32_t length)
{
	const uint8_t *list = task->buffer;
	uint32_t cscds = get_be16(list + 2);
	uint32_t segments = get_be32(list + 8);
	uint64_t inlined = get_be32(list + 12);
	unsigned usage = list[1] >> 3 & 3;
	enum scsi_asc asc;
	int wrong;

	if (usage == USAGE_RESERVED || (usage == USAGE_DISABLE && list[0] != 0)) {
		task_bad_list(task, usage == USAGE_RESERVED ? 1 : 0, usage == USAGE_RESERVED ? 4 : -1);
		return false;
	}
	if ((uint64_t)cscds + segments > COPY_MAX_LIST || cscds + segments + inlined > length - HEADER) {
		return refuse(task, ASC_PARAMETER_LIST_LENGTH);
	}
	if (inlined != 0) {
		return refuse(task, ASC_INLINE_DATA_LENGTH);
	}
	if (cscds / COPY_CSCD_SIZE > COPY_MAX_CSCDS) {
		return refuse(task, ASC_TOO_MANY_CSCDS);
	}
	if (segments / COPY_SEGMENT_SIZE > COPY_MAX_SEGMENTS) {
		return refuse(task, ASC_TOO_MANY_SEGMENTS);
	}
	copy_of(task)->segments = segments / COPY_SEGMENT_SIZE;
	copy_of(task)->recorded = usage != USAGE_DISABLE;
	wrong = check_descriptors(task, cscds, segments, &asc);
	if (wrong >= 0) {
		task_bad_field(task, asc, (unsigned)wrong);
	}
	return wrong < 0;
}

void run_extended_copy(struct scsi_task *task)
{
	uint32_t length = get_be32(task->cdb + 10);
	struct copy *copy;

	if (length == 0) {
		task_good(task);
		return;
	}
	if (length < HEADER || length > LIST_ROOM) {
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_PARAMETER_LIST_LENGTH);
		return;
	}
	if (!task_list(task, length)) {
		return;
	}
	task->buffer_used = true;
	*copy_of(task) = (struct copy){0};
	task->failed = part_failed;
	if (!check_list(task, length)) {
		return;
	}
	copy = copy_of(task);
	if (task->again && !copy_can_repeat(copy->cscds, copy->list, copy->segments)) {
		fail(task, ASC_THIRD_PARTY_FAILURE, -1); /* the initiator knows what it wanted */
		return;
	}
	record(task, COPY_UNDER_WAY, NULL, 0);
	next_segment(task);
}
