/*
 * Mode parameters, SPC-5 sections 6.13 to 6.16 and 7.5, SBC-4 section 6.5. They are shared by all ports of
 * a unit. What can be changed is WCE, D_SENSE and SWP; nothing is saved.
 */
#include "scsi/commands.h"
#include "scsi/task.h"

#define PS_SPF 0xc0
#define ALL_PAGES 0x3f
#define ALL_SUBPAGES 0xff
#define WRITE_PROTECTED 0x80 /* device-specific parameter, SBC-4 section 6.5.1 */
#define DPOFUA 0x10
#define DBD 0x08
#define LLBAA 0x10
#define SAVE_PAGES 0x01
#define PAGE_FORMAT 0x10

enum page_control {
	CURRENT,
	CHANGEABLE,
	DEFAULT,
	SAVED,
};

struct values {
	bool write_cache;
	bool descriptor_sense;
	bool write_protect;
};

static struct values values_of(const struct scsi_task *task, enum page_control control)
{
	const struct scsi_state *state = shared_state(task->unit->shared);

	switch (control) {
	case CHANGEABLE:
		return (struct values){true, true, true};
	case DEFAULT:
		return (struct values){.write_cache = true};
	default:
		return (struct values){state->write_cache, state->descriptor_sense, state->write_protect};
	}
}

/* --- pages: each writes its parameters after code and length; @fixed adds what cannot be changed ------ */

static void page_recovery(uint8_t *out, const struct values *values, bool fixed)
{
	if (fixed) {
		out[0] = 0xc0; /* AWRE, ARRE: what lies below sees to that */
	}
}

static void page_caching(uint8_t *out, const struct values *values, bool fixed)
{
	out[0] = values->write_cache ? 0x04 : 0; /* WCE */
}

static void page_control(uint8_t *out, const struct values *values, bool fixed)
{
	/* D_SENSE; and TST: each nexus has a task set of its own */
	out[0] = (uint8_t)((values->descriptor_sense ? 0x04 : 0) | (fixed ? 0x20 : 0));
	out[2] = values->write_protect ? 0x08 : 0; /* SWP */
	if (fixed) {
		out[1] = 0x10;		   /* unrestricted reordering */
		put_be16(out + 6, 0xffff); /* no busy timeout */
	}
}

static void page_exceptions(uint8_t *out, const struct values *values, bool fixed)
{
	if (fixed) {
		out[0] = 0x08; /* DEXCPT: none are reported */
	}
}

static const struct page {
	uint8_t code;
	uint8_t length;
	void (*write)(uint8_t *out, const struct values *values, bool fixed);
} pages[] = {
    {0x01, 10, page_recovery},
    {0x08, 18, page_caching},
    {0x0a, 10, page_control},
    {0x1c, 10, page_exceptions},
};

#define PAGES (sizeof(pages) / sizeof(pages[0]))

static unsigned put_page(const struct scsi_task *task, const struct page *page, enum page_control control,
			 uint8_t *out)
{
	struct values values = values_of(task, control);

	memset(out, 0, page->length + 2u);
	out[0] = page->code;
	out[1] = page->length;
	page->write(out + 2, &values, control != CHANGEABLE);
	return page->length + 2u;
}

/* --- MODE SENSE ------------------------------------------------------------------------------------- */

static unsigned put_block_descriptor(const struct scsi_task *task, bool is_long, uint8_t *out)
{
	uint64_t blocks = unit_blocks(task->unit);
	uint32_t size = unit_block_size(task->unit);

	memset(out, 0, 16);
	if (is_long) {
		put_be64(out, blocks);
		put_be32(out + 12, size);
		return 16;
	}
	put_be32(out, blocks <= UINT32_MAX ? (uint32_t)blocks : UINT32_MAX);
	put_be24(out + 5, size);
	return 8;
}

/* Write the pages that the CDB asks for; returns their length, or 0 when there is no such page. */
static unsigned put_pages(const struct scsi_task *task, uint8_t *out)
{
	enum page_control control = task->cdb[2] >> 6;
	uint8_t code = task->cdb[2] & 0x3f;
	uint8_t subpage = task->cdb[3];
	unsigned length = 0;

	if (subpage != 0 && subpage != ALL_SUBPAGES) {
		return 0;
	}
	for (unsigned i = 0; i < PAGES; i++) {
		if (code == ALL_PAGES || code == pages[i].code) {
			length += put_page(task, &pages[i], control, out + length);
		}
	}
	return length;
}

static void mode_sense(struct scsi_task *task, unsigned header, bool is_long, uint16_t allocation)
{
	uint8_t data[8 + 16 + 64];
	unsigned descriptor = 0;
	unsigned length;
	uint8_t specific = DPOFUA | (task->unit->write_protect ? WRITE_PROTECTED : 0);

	if (task->cdb[2] >> 6 == SAVED) {
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_SAVING_NOT_SUPPORTED);
		return;
	}
	memset(data, 0, header);
	if (!(task->cdb[1] & DBD)) {
		descriptor = put_block_descriptor(task, is_long, data + header);
	}
	length = put_pages(task, data + header + descriptor);
	if (length == 0) {
		task_bad_cdb(task, 2, 5);
		return;
	}
	length += header + descriptor;
	if (header == 4) {
		data[0] = (uint8_t)(length - 1);
		data[2] = specific;
		data[3] = (uint8_t)descriptor;
	} else {
		put_be16(data, (uint16_t)(length - 2));
		data[3] = specific;
		data[4] = is_long ? 0x01 : 0; /* LONGLBA */
		put_be16(data + 6, (uint16_t)descriptor);
	}
	task_reply(task, data, length, allocation);
}

void run_mode_sense_6(struct scsi_task *task)
{
	mode_sense(task, 4, false, task->cdb[4]);
}

void run_mode_sense_10(struct scsi_task *task)
{
	mode_sense(task, 8, task->cdb[1] & LLBAA, get_be16(task->cdb + 7));
}

/* --- MODE SELECT ------------------------------------------------------------------------------------ */

/* Is a block descriptor what the medium has? Zero blocks mean: leave the number as it is. */
static bool check_descriptor(struct scsi_task *task, unsigned at, unsigned length)
{
	const uint8_t *list = task->buffer + at;
	uint8_t now[16];
	uint64_t count;

	if (length == 0) {
		return true;
	}
	put_block_descriptor(task, length == 16, now);
	count = length == 16 ? get_be64(list) : get_be32(list);
	if (count != 0 && memcmp(list, now, length == 16 ? 8 : 4) != 0) {
		task_bad_list(task, at, -1);
		return false;
	}
	if (memcmp(list + length - 3, now + length - 3, 3) != 0) {
		task_bad_list(task, at + length - 3, -1);
		return false;
	}
	return true;
}

static const struct page *find_page(uint8_t code)
{
	for (unsigned i = 0; i < PAGES; i++) {
		if (pages[i].code == code) {
			return &pages[i];
		}
	}
	return NULL;
}

/* Check one page of the list at @at against what may change; its length, or 0: the task has ended. */
static unsigned check_page(struct scsi_task *task, unsigned at, unsigned end, struct values *values)
{
	const uint8_t *list = task->buffer + at;
	const struct page *page = find_page(list[0] & 0x3f);
	uint8_t current[32];
	uint8_t mask[32];

	if (page == NULL || list[0] & PS_SPF) {
		task_bad_list(task, at, page == NULL ? 5 : 7);
		return 0;
	}
	if (end - at < 2u || end - at < 2u + page->length) {
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_PARAMETER_LIST_LENGTH);
		return 0;
	}
	if (list[1] != page->length) {
		task_bad_list(task, at + 1, -1);
		return 0;
	}
	put_page(task, page, CURRENT, current);
	put_page(task, page, CHANGEABLE, mask);
	for (unsigned i = 2; i < 2u + page->length; i++) {
		unsigned bad = (list[i] ^ current[i]) & ~mask[i] & 0xff;

		if (bad != 0) {
			task_bad_list(task, at + i, 31 - __builtin_clz(bad));
			return 0;
		}
	}
	if (page->write == page_caching) {
		values->write_cache = list[2] & 0x04;
	} else if (page->write == page_control) {
		values->descriptor_sense = list[2] & 0x04;
		values->write_protect = list[4] & 0x08;
	}
	return 2u + page->length;
}

static void store(struct scsi_task *task, const struct values *values)
{
	struct scsi_shared *shared = task->unit->shared;
	struct scsi_state *state;

	shared_lock(shared);
	state = shared_edit(shared);
	state->write_cache = values->write_cache;
	state->descriptor_sense = values->descriptor_sense;
	state->write_protect = values->write_protect;
	shared_commit(shared);
	shared_unlock(shared);
	scsi_shared_attention(shared, SCSI_ATTENTION_MODE_CHANGED, (int)task->unit->nexus);
	task_good(task);
}

/* What the cache holds must be durable before it is switched off. */
static void cache_flushed(struct scsi_task *task)
{
	struct values values = values_of(task, CURRENT);

	values.write_cache = false;
	values.descriptor_sense = task->position & 1;
	values.write_protect = task->position & 2;
	store(task, &values);
}

static void mode_select(struct scsi_task *task, unsigned header, uint16_t length)
{
	struct values values = values_of(task, CURRENT);
	const uint8_t *list = task->buffer;
	bool cached = values.write_cache;
	unsigned descriptor;
	unsigned at;

	if (task->cdb[1] & SAVE_PAGES) {
		task_bad_cdb(task, 1, 0);
		return;
	}
	if (!(task->cdb[1] & PAGE_FORMAT)) {
		task_bad_cdb(task, 1, 4);
		return;
	}
	if (length == 0) {
		task_good(task);
		return;
	}
	if (!task_list(task, length)) {
		return;
	}
	if (length < header) {
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_PARAMETER_LIST_LENGTH);
		return;
	}
	descriptor = header == 4 ? list[3] : get_be16(list + 6);
	if (descriptor != 0 && descriptor != (header == 8 && list[4] & 1 ? 16 : 8)) {
		task_bad_list(task, header == 4 ? 3 : 6, -1);
		return;
	}
	if (length < header + descriptor) {
		task_sense(task, KEY_ILLEGAL_REQUEST, ASC_PARAMETER_LIST_LENGTH);
		return;
	}
	if (!check_descriptor(task, header, descriptor)) {
		return;
	}
	for (at = header + descriptor; at < length;) {
		unsigned used = check_page(task, at, length, &values);

		if (used == 0) {
			return;
		}
		at += used;
	}
	if (cached && !values.write_cache) {
		task->position = (values.descriptor_sense ? 1 : 0) | (values.write_protect ? 2 : 0);
		task_submit(task, BDEV_FLUSH, 0, 0, cache_flushed);
		return;
	}
	store(task, &values);
}

void run_mode_select_6(struct scsi_task *task)
{
	mode_select(task, 4, task->cdb[4]);
}

void run_mode_select_10(struct scsi_task *task)
{
	mode_select(task, 8, get_be16(task->cdb + 7));
}
