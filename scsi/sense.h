/* Sense data, SPC-5 section 4.4. */
#ifndef SCSI_SENSE_H
#define SCSI_SENSE_H

#include <stdbool.h>
#include <stdint.h>

#include "scsi/spec.h"

/* Sense data before it has a format. */
struct sense {
	enum scsi_key key;
	uint16_t asc; /* and its qualifier */
	bool has_information;
	bool has_specific;
	bool has_command_specific;
	uint32_t command_specific;
	uint64_t information;
	uint8_t specific[3]; /* sense-key specific bytes */
};

/* Write @sense to @out, at least SCSI_SENSE_SIZE bytes; returns its length. */
uint8_t sense_write(const struct sense *sense, bool descriptors, uint8_t *out);

#endif
