/* EXTENDED COPY: what its two halves share, and VPD page 8Fh says. SPC-5 sections 5.16, 6.6, 6.20 to 6.24. */
#ifndef SCSI_COPY_H
#define SCSI_COPY_H

#include <stdint.h>

#include "scsi/shared.h"

struct scsi_unit;

#define COPY_MAX_CSCDS 16
#define COPY_MAX_SEGMENTS 64
#define COPY_CSCD_SIZE 32    /* of a copy source or copy destination descriptor */
#define COPY_SEGMENT_SIZE 28 /* of a block to block descriptor */
#define COPY_MAX_LIST (COPY_MAX_CSCDS * COPY_CSCD_SIZE + COPY_MAX_SEGMENTS * COPY_SEGMENT_SIZE)
#define COPY_IDENTIFICATION 0xe4 /* descriptor type: a CSCD by its designator */
#define COPY_BLOCK_TO_BLOCK 0x02 /* descriptor type */

/* Write what follows the header of the third-party copy page; returns its length. */
unsigned copy_page(uint8_t *out);
/* Is the outcome of these segments the same when some of it has been carried out before? */
bool copy_can_repeat(struct scsi_unit *const *cscds, const uint8_t *segments, uint32_t count);

#endif
