/* What the two halves of persistent reservations share: SPC-5 sections 5.14, 6.16 and 6.17. */
#ifndef SCSI_PERSISTENT_H
#define SCSI_PERSISTENT_H

#include <stdbool.h>
#include <stdint.h>

#include "scsi/shared.h"
#include "scsi/spec.h"

#define PROTOCOL_SAS 0x6
#define TRANSPORT_ID_SIZE 24 /* SPC-5 section 7.6.4.6 */

static inline bool pr_is_valid(uint8_t type)
{
	return type == PR_WRITE_EXCLUSIVE || type == PR_EXCLUSIVE_ACCESS ||
	       (type >= PR_WRITE_EXCLUSIVE_REGISTRANTS && type <= PR_EXCLUSIVE_ACCESS_ALL);
}

/* Every registrant holds the reservation. */
static inline bool pr_is_all(uint8_t type)
{
	return type == PR_WRITE_EXCLUSIVE_ALL || type == PR_EXCLUSIVE_ACCESS_ALL;
}

static inline bool pr_is_holder(const struct scsi_state *state, uint32_t nexus)
{
	if (state->pr_type == PR_NONE) {
		return false;
	}
	return pr_is_all(state->pr_type) ? state->nexus[nexus].key != 0 : state->pr_holder == nexus;
}

#endif
