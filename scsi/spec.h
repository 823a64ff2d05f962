/* Numbers of the SCSI standards that more than one file needs: SAM-6, SPC-5 and SBC-4. */
#ifndef SCSI_SPEC_H
#define SCSI_SPEC_H

#include <stdint.h>
#include <string.h>

/* cffi: begin */
/* Status codes, SAM-6 section 5.3. */
enum scsi_status {
	SCSI_GOOD = 0x00,
	SCSI_CHECK_CONDITION = 0x02,
	SCSI_CONDITION_MET = 0x04,
	SCSI_BUSY = 0x08,
	SCSI_RESERVATION_CONFLICT = 0x18,
	SCSI_TASK_SET_FULL = 0x28,
	SCSI_ACA_ACTIVE = 0x30,
};

/* Task attributes as transports encode them, SAM-6 section 8.9 (virtio 1.2, section 5.6.6.1). */
enum scsi_attribute {
	SCSI_SIMPLE,
	SCSI_ORDERED,
	SCSI_HEAD_OF_QUEUE,
	SCSI_ACA,
};

/* cffi: end */

/* Sense keys, SPC-5 section 4.4.8. */
enum scsi_key {
	KEY_NO_SENSE = 0x0,
	KEY_NOT_READY = 0x2,
	KEY_MEDIUM_ERROR = 0x3,
	KEY_HARDWARE_ERROR = 0x4,
	KEY_ILLEGAL_REQUEST = 0x5,
	KEY_UNIT_ATTENTION = 0x6,
	KEY_DATA_PROTECT = 0x7,
	KEY_COPY_ABORTED = 0xa,
	KEY_ABORTED_COMMAND = 0xb,
	KEY_MISCOMPARE = 0xe,
};

/* Additional sense codes with their qualifiers, SPC-5 annex F. */
enum scsi_asc {
	ASC_NONE = 0x0000,
	ASC_NOT_READY_BECOMING_READY = 0x0401,
	ASC_NOT_READY_INITIALIZING_COMMAND = 0x0402,
	ASC_NOT_READY_SANITIZE = 0x041b,
	ASC_UNREACHABLE_COPY_TARGET = 0x0804,
	ASC_WRITE_ERROR = 0x0c00,
	ASC_THIRD_PARTY_FAILURE = 0x0d01,
	ASC_READ_ERROR = 0x1100,
	ASC_PARAMETER_LIST_LENGTH = 0x1a00,
	ASC_MISCOMPARE = 0x1d00,
	ASC_INVALID_OPCODE = 0x2000,
	ASC_LBA_OUT_OF_RANGE = 0x2100,
	ASC_INVALID_FIELD_IN_CDB = 0x2400,
	ASC_UNIT_NOT_SUPPORTED = 0x2500,
	ASC_INVALID_FIELD_IN_LIST = 0x2600,
	ASC_INVALID_RELEASE = 0x2604,
	ASC_TOO_MANY_CSCDS = 0x2606,
	ASC_UNSUPPORTED_CSCD = 0x2607,
	ASC_TOO_MANY_SEGMENTS = 0x2608,
	ASC_UNSUPPORTED_SEGMENT = 0x2609,
	ASC_INEXACT_SEGMENT = 0x260a,
	ASC_INLINE_DATA_LENGTH = 0x260b,
	ASC_WRITE_PROTECTED = 0x2700,
	ASC_SPACE_ALLOCATION_FAILED = 0x2707,
	ASC_POWER_ON = 0x2900,
	ASC_TARGET_RESET = 0x2903,
	ASC_NEXUS_LOSS = 0x2907,
	ASC_MODE_CHANGED = 0x2a01,
	ASC_RESERVATIONS_PREEMPTED = 0x2a03,
	ASC_RESERVATIONS_RELEASED = 0x2a04,
	ASC_REGISTRATIONS_PREEMPTED = 0x2a05,
	ASC_CAPACITY_CHANGED = 0x2a09,
	ASC_COMMANDS_CLEARED = 0x2f00,
	ASC_SANITIZE_FAILED = 0x3103,
	ASC_SAVING_NOT_SUPPORTED = 0x3900,
	ASC_LUNS_CHANGED = 0x3f0e,
	ASC_INTERNAL_FAILURE = 0x4400,
	ASC_INVALID_MESSAGE = 0x4900,
	ASC_INSUFFICIENT_REGISTRATION = 0x5504,
};

/* Fields of CDBs and parameter data are big-endian. */
static inline uint16_t get_be16(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}

static inline uint32_t get_be24(const uint8_t *p)
{
	return (uint32_t)p[0] << 16 | (uint32_t)p[1] << 8 | p[2];
}

static inline uint32_t get_be32(const uint8_t *p)
{
	uint32_t value;

	memcpy(&value, p, sizeof(value));
	return __builtin_bswap32(value);
}

static inline uint64_t get_be64(const uint8_t *p)
{
	uint64_t value;

	memcpy(&value, p, sizeof(value));
	return __builtin_bswap64(value);
}

static inline void put_be16(uint8_t *p, uint16_t value)
{
	p[0] = (uint8_t)(value >> 8);
	p[1] = (uint8_t)value;
}

static inline void put_be24(uint8_t *p, uint32_t value)
{
	p[0] = (uint8_t)(value >> 16);
	put_be16(p + 1, (uint16_t)value);
}

static inline void put_be32(uint8_t *p, uint32_t value)
{
	value = __builtin_bswap32(value);
	memcpy(p, &value, sizeof(value));
}

static inline void put_be64(uint8_t *p, uint64_t value)
{
	value = __builtin_bswap64(value);
	memcpy(p, &value, sizeof(value));
}

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the accessors swap bytes");

#endif
