#include "scsi/sense.h"

#define SENSE_ROOM 28 /* no sense data of ours has more than two descriptors */
#define FIXED_LENGTH 18
#define FIXED_MAX_INFORMATION UINT32_MAX

enum {
	FORMAT_FIXED = 0x70,
	FORMAT_DESCRIPTOR = 0x72,
	VALID = 0x80,
	DESCRIPTOR_INFORMATION = 0x00,
	DESCRIPTOR_COMMAND_SPECIFIC = 0x01,
	DESCRIPTOR_SPECIFIC = 0x02,
};

static uint8_t write_fixed(const struct sense *sense, uint8_t *out)
{
	out[0] = FORMAT_FIXED;
	out[2] = sense->key;
	out[7] = FIXED_LENGTH - 8;
	put_be16(out + 12, sense->asc);
	/* A number that has no room in four bytes is left out (section 4.4.3). */
	if (sense->has_information && sense->information <= FIXED_MAX_INFORMATION) {
		out[0] |= VALID;
		put_be32(out + 3, (uint32_t)sense->information);
	}
	if (sense->has_command_specific) {
		put_be32(out + 8, sense->command_specific);
	}
	if (sense->has_specific) {
		memcpy(out + 15, sense->specific, sizeof(sense->specific));
	}
	return FIXED_LENGTH;
}

static uint8_t write_descriptors(const struct sense *sense, uint8_t *out)
{
	uint8_t length = 8;

	out[0] = FORMAT_DESCRIPTOR;
	out[1] = sense->key;
	put_be16(out + 2, sense->asc);
	if (sense->has_information) {
		uint8_t *at = out + length;

		at[0] = DESCRIPTOR_INFORMATION;
		at[1] = 10;
		at[2] = VALID;
		put_be64(at + 4, sense->information);
		length += 12;
	}
	if (sense->has_command_specific) {
		uint8_t *at = out + length;

		at[0] = DESCRIPTOR_COMMAND_SPECIFIC;
		at[1] = 10;
		put_be64(at + 4, sense->command_specific);
		length += 12;
	}
	if (sense->has_specific) {
		uint8_t *at = out + length;

		at[0] = DESCRIPTOR_SPECIFIC;
		at[1] = 6;
		memcpy(at + 4, sense->specific, sizeof(sense->specific));
		length += 8;
	}
	out[7] = length - 8;
	return length;
}

uint8_t sense_write(const struct sense *sense, bool descriptors, uint8_t *out)
{
	memset(out, 0, SENSE_ROOM);
	return descriptors ? write_descriptors(sense, out) : write_fixed(sense, out);
}
