/*
 * INQUIRY and its vital product data: SPC-5 sections 6.7 and 7.7, SBC-4 section 6.6. What is claimed is SPC-4
 * and SBC-3, of which nothing that is mandatory is missing, and which initiators know.
 */
#include <stdio.h>

#include "scsi/commands.h"
#include "scsi/copy.h"
#include "scsi/limits.h"
#include "scsi/task.h"

#define EVPD 0x01
#define STANDARD_SIZE 96
#define NO_PERIPHERAL 0x7f	   /* qualifier 011b, type 1Fh: nothing can be here */
#define WELL_KNOWN_PERIPHERAL 0x1e /* type of a well-known logical unit */
#define PROTOCOL_SAS 0x6

enum association {
	OF_UNIT = 0x00,
	OF_PORT = 0x10,
	WITH_PROTOCOL = 0x80, /* PIV */
};

enum designator {
	DESIGNATOR_T10 = 1,
	DESIGNATOR_NAA = 3,
	DESIGNATOR_RELATIVE_PORT = 4,
	DESIGNATOR_PORT_GROUP = 5,
	DESIGNATOR_UUID = 10,
	CODE_BINARY = 1,
	CODE_ASCII = 2,
};

static uint8_t peripheral(const struct scsi_task *task)
{
	if (task->well_known) {
		return WELL_KNOWN_PERIPHERAL;
	}
	return task->unit != NULL ? 0 : NO_PERIPHERAL;
}

static void reply(struct scsi_task *task, const void *data, uint64_t length)
{
	task_reply(task, data, length, get_be16(task->cdb + 3));
}

static void standard(struct scsi_task *task)
{
	/* SAM-5, SPC-4 and SBC-3, no version claimed (annex of version descriptors). */
	static const uint16_t versions[] = {0x00a0, 0x0460, 0x04c0};
	uint8_t data[STANDARD_SIZE] = {
	    [0] = peripheral(task),
	    [2] = 0x06, /* SPC-4 */
	    [3] = 0x32, /* NORMACA, HISUP, response data format 2 */
	    [4] = STANDARD_SIZE - 5,
	    [5] = 0x18, /* TPGS: implicit; 3PC */
	    [6] = 0x10, /* MULTIP */
	    [7] = 0x02, /* CMDQUE */
	};

	memset(data + 8, ' ', 28);
	if (task->unit != NULL) {
		const struct scsi_identity *identity = &task->unit->identity;

		memcpy(data + 8, identity->vendor, sizeof(identity->vendor));
		memcpy(data + 16, identity->product, sizeof(identity->product));
		memcpy(data + 32, identity->revision, sizeof(identity->revision));
	}
	for (unsigned i = 0; i < sizeof(versions) / sizeof(versions[0]); i++) {
		put_be16(data + 58 + 2 * i, versions[i]);
	}
	reply(task, data, sizeof(data));
}

/* --- pages: each writes what follows the four bytes of header, and returns how much ------------------ */

static unsigned page_serial(struct scsi_task *task, uint8_t *out)
{
	memcpy(out, task->unit->identity.serial, sizeof(task->unit->identity.serial));
	return sizeof(task->unit->identity.serial);
}

static unsigned designator(uint8_t *out, unsigned code, unsigned kind, const void *data, unsigned length)
{
	out[0] = (uint8_t)(code | (kind & WITH_PROTOCOL ? PROTOCOL_SAS << 4 : 0));
	out[1] = (uint8_t)kind;
	out[2] = 0;
	out[3] = (uint8_t)length;
	memcpy(out + 4, data, length);
	return 4 + length;
}

/* A locally assigned NAA (3h) of the unit: 60 bits of its UUID, mixed so that all of it counts. */
static uint64_t naa_of(const uint8_t *uuid)
{
	uint64_t hash = 0xcbf29ce484222325; /* FNV-1a */

	for (int i = 0; i < 16; i++) {
		hash = (hash ^ uuid[i]) * 0x100000001b3;
	}
	return 3ull << 60 | hash >> 4;
}

bool unit_is_called(const struct scsi_unit *unit, const uint8_t *designator)
{
	const uint8_t *uuid = unit->identity.uuid;
	bool binary = (designator[0] & 0x0f) == CODE_BINARY;

	if (!binary || (designator[1] & 0x30) != OF_UNIT) {
		return false;
	}
	switch (designator[1] & 0x0f) {
	case DESIGNATOR_NAA:
		return designator[3] == 8 && get_be64(designator + 4) == naa_of(uuid);
	case DESIGNATOR_UUID:
		return designator[3] == 18 && memcmp(designator + 6, uuid, 16) == 0;
	default:
		return false;
	}
}

static unsigned port_designators(const struct scsi_ports *ports, uint8_t *out)
{
	uint8_t name[8];
	uint8_t relative[4] = {0};
	uint8_t group[4] = {[3] = SCSI_PORT_GROUP};
	unsigned length;

	put_be64(name, ports->target);
	put_be16(relative + 2, ports->relative);
	length = designator(out, CODE_BINARY, WITH_PROTOCOL | OF_PORT | DESIGNATOR_NAA, name, 8);
	length += designator(out + length, CODE_BINARY, WITH_PROTOCOL | OF_PORT | DESIGNATOR_RELATIVE_PORT,
			     relative, 4);
	length +=
	    designator(out + length, CODE_BINARY, WITH_PROTOCOL | OF_PORT | DESIGNATOR_PORT_GROUP, group, 4);
	return length;
}

static unsigned page_identification(struct scsi_task *task, uint8_t *out)
{
	const struct scsi_identity *identity = &task->unit->identity;
	const uint8_t *uuid = identity->uuid;
	uint8_t naa[8];
	uint8_t binary[18] = {0x10};
	char text[8 + 33];
	unsigned length;

	put_be64(naa, naa_of(uuid));
	length = designator(out, CODE_BINARY, OF_UNIT | DESIGNATOR_NAA, naa, sizeof(naa));
	memcpy(binary + 2, uuid, 16);
	length += designator(out + length, CODE_BINARY, OF_UNIT | DESIGNATOR_UUID, binary, sizeof(binary));
	memcpy(text, identity->vendor, 8);
	for (int i = 0; i < 16; i++) {
		snprintf(text + 8 + 2 * i, 3, "%02x", uuid[i]);
	}
	length += designator(out + length, CODE_ASCII, OF_UNIT | DESIGNATOR_T10, text, 8 + 32);
	return length + port_designators(&task->target->ports, out + length);
}

/* Management network addresses: none. */
static unsigned page_management(struct scsi_task *task, uint8_t *out)
{
	return 0;
}

static unsigned page_extended(struct scsi_task *task, uint8_t *out)
{
	out[1] = 0x07; /* HEADSUP, ORDSUP, SIMPSUP */
	out[2] = 0x01; /* V_SUP: there is a volatile cache */
	out[3] = 0x01; /* LUICLR: conditions of one nexus are cleared for that nexus alone */
	out[9] = SCSI_SENSE_SIZE;
	return 60;
}

/* One policy for all pages and subpages: shared between ports. */
static unsigned page_policy(struct scsi_task *task, uint8_t *out)
{
	out[0] = 0x3f;
	out[1] = 0xff;
	return 4;
}

static unsigned page_ports(struct scsi_task *task, uint8_t *out)
{
	const struct scsi_ports *ports = &task->target->ports;
	uint8_t name[8];
	unsigned length;

	put_be64(name, ports->target);
	put_be16(out + 2, ports->relative);
	length = designator(out + 12, CODE_BINARY, WITH_PROTOCOL | OF_PORT | DESIGNATOR_NAA, name, 8);
	put_be16(out + 10, (uint16_t)length);
	return 12 + length;
}

static unsigned page_copy(struct scsi_task *task, uint8_t *out)
{
	return copy_page(out);
}

static unsigned page_limits(struct scsi_task *task, uint8_t *out)
{
	uint32_t block = unit_block_size(task->unit);
	uint32_t atomic = SCSI_ATOMIC_BYTES / block;

	out[0] = 0x01; /* WSNZ: WRITE SAME of no blocks is refused */
	out[1] = atomic < UINT8_MAX ? (uint8_t)atomic : UINT8_MAX;
	if (unit_can_unmap(task->unit)) {
		put_be32(out + 16, SCSI_MAX_UNMAP_BLOCKS);
		put_be32(out + 20, SCSI_MAX_UNMAP_RANGES);
	}
	put_be64(out + 32, SCSI_MAX_SAME_BLOCKS);
	if (unit_writes_atomically(task->unit)) {
		put_be32(out + 40, atomic); /* any alignment, no boundaries */
	}
	return 60;
}

static unsigned page_characteristics(struct scsi_task *task, uint8_t *out)
{
	put_be16(out, task->unit->identity.rotational ? 0 : 1); /* not reported, or not rotating */
	out[3] = 0x40; /* WABEREQ 01b: after a BLOCK ERASE blocks can be read */
	return 60;
}

static unsigned page_provisioning(struct scsi_task *task, uint8_t *out)
{
	if (unit_can_unmap(task->unit)) {
		out[1] = 0xe0; /* LBPU, LBPWS, LBPWS10; what was unmapped may read as anything: no LBPRZ */
		out[2] = 0x02; /* thin */
	}
	return 4;
}

static unsigned page_supported(struct scsi_task *task, uint8_t *out);

static const struct page {
	uint8_t code;
	unsigned (*write)(struct scsi_task *task, uint8_t *out);
} pages[] = {
    {0x00, page_supported}, {0x80, page_serial},	  {0x83, page_identification}, {0x85, page_management},
    {0x86, page_extended},  {0x87, page_policy},	  {0x88, page_ports},	       {0x8f, page_copy},
    {0xb0, page_limits},    {0xb1, page_characteristics}, {0xb2, page_provisioning},
};

#define PAGES (sizeof(pages) / sizeof(pages[0]))

static unsigned page_supported(struct scsi_task *task, uint8_t *out)
{
	/* Where there is no logical unit this is the only page. */
	unsigned count = task->unit != NULL ? PAGES : 1;

	for (unsigned i = 0; i < count; i++) {
		out[i] = pages[i].code;
	}
	return count;
}

static void vital(struct scsi_task *task)
{
	unsigned count = task->unit != NULL ? PAGES : 1;
	uint8_t data[256] = {peripheral(task), task->cdb[2]};

	for (unsigned i = 0; i < count; i++) {
		if (pages[i].code == task->cdb[2]) {
			unsigned length = pages[i].write(task, data + 4);

			put_be16(data + 2, (uint16_t)length);
			reply(task, data, 4 + length);
			return;
		}
	}
	task_bad_cdb(task, 2, 7);
}

void run_inquiry(struct scsi_task *task)
{
	if (task->cdb[1] & EVPD) {
		vital(task);
	} else if (task->cdb[2] != 0) {
		task_bad_cdb(task, 2, 7);
	} else {
		standard(task);
	}
}
