/* LOG SENSE, SPC-5 sections 6.9 and 7.3: pages that say there is nothing to worry about. */
#include "scsi/commands.h"
#include "scsi/limits.h"
#include "scsi/task.h"

#define SAVE_PARAMETERS 0x01
#define CUMULATIVE 1 /* page control */
#define ALL_SUBPAGES 0xff
#define PARAMETER_BINARY_LIST 0x03 /* control byte: format and linking */

static unsigned put_parameter(uint8_t *out, uint16_t code, uint8_t control, const void *value, unsigned length)
{
	put_be16(out, code);
	out[2] = control;
	out[3] = (uint8_t)length;
	memcpy(out + 4, value, length);
	return 4 + length;
}

/* SPC-5 section 7.3.24: FFh is "no temperature is available". */
static unsigned page_temperature(const struct scsi_task *task, uint8_t *out)
{
	static const uint8_t unknown[2] = {0, 0xff};
	unsigned length = put_parameter(out, 0, PARAMETER_BINARY_LIST, unknown, 2);

	return length + put_parameter(out + length, 1, PARAMETER_BINARY_LIST, unknown, 2);
}

/* SPC-5 section 7.3.21: dates are spaces where they are not known. */
static unsigned page_start_stop(const struct scsi_task *task, uint8_t *out)
{
	static const uint8_t zero[4];
	unsigned length = put_parameter(out, 1, 0x01, "      ", 6);

	length += put_parameter(out + length, 2, 0x01, "      ", 6);
	for (uint16_t code = 3; code <= 6; code++) {
		length += put_parameter(out + length, code, PARAMETER_BINARY_LIST, zero, 4);
	}
	return length;
}

/* SBC-4 section 6.4.4: a bdev does not say how much of it is in use, so the page has no parameters. */
static unsigned page_provisioning(const struct scsi_task *task, uint8_t *out)
{
	return 0;
}

static unsigned page_supported(const struct scsi_task *task, uint8_t *out);

static const struct page {
	uint8_t code;
	bool thin; /* only where blocks can be unmapped */
	unsigned (*write)(const struct scsi_task *task, uint8_t *out);
} pages[] = {
    {0x00, false, page_supported},
    {0x0c, true, page_provisioning},
    {0x0d, false, page_temperature},
    {0x0e, false, page_start_stop},
};

#define PAGES (sizeof(pages) / sizeof(pages[0]))

static bool has_page(const struct scsi_task *task, const struct page *page)
{
	return !page->thin || unit_can_unmap(task->unit);
}

static unsigned page_supported(const struct scsi_task *task, uint8_t *out)
{
	bool subpages = task->cdb[3] == ALL_SUBPAGES;
	unsigned length = 0;

	for (unsigned i = 0; i < PAGES; i++) {
		if (!has_page(task, &pages[i])) {
			continue;
		}
		out[length++] = pages[i].code;
		if (subpages) {
			out[length++] = 0;
			if (pages[i].code == 0) {
				out[length++] = 0;
				out[length++] = ALL_SUBPAGES;
			}
		}
	}
	return length;
}

void run_log_sense(struct scsi_task *task)
{
	uint8_t code = task->cdb[2] & 0x3f;
	uint8_t subpage = task->cdb[3];
	uint8_t data[256] = {0};

	if (task->cdb[1] & SAVE_PARAMETERS) {
		task_bad_cdb(task, 1, 0);
		return;
	}
	if (task->cdb[2] >> 6 != CUMULATIVE) {
		task_bad_cdb(task, 2, 7);
		return;
	}
	if (subpage != 0 && (subpage != ALL_SUBPAGES || code != 0)) {
		task_bad_cdb(task, 3, 7);
		return;
	}
	for (unsigned i = 0; i < PAGES; i++) {
		if (pages[i].code == code && has_page(task, &pages[i])) {
			unsigned length = pages[i].write(task, data + 4);

			data[0] = (uint8_t)(code | (subpage != 0 ? 0x40 : 0)); /* SPF */
			data[1] = subpage;
			put_be16(data + 2, (uint16_t)length);
			task_reply(task, data, 4 + length, get_be16(task->cdb + 7));
			return;
		}
	}
	task_bad_cdb(task, 2, 5);
}
