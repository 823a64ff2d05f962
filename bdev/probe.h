/* What a file can do, found out by asking or by trying, without changing a byte of it. */
#ifndef BDEV_PROBE_H
#define BDEV_PROBE_H

#include <stdint.h>

/* cffi: begin */
struct direct_alignment {
	uint32_t memory; /* of buffers' addresses and lengths */
	uint32_t offset; /* of offsets and lengths in the file */
};

/*
 * What O_DIRECT demands of a file that is open with it: 0; -EOPNOTSUPP if nothing that was tried works, or
 * -errno of the attempt.
 */
int file_probe_direct(int fd, struct direct_alignment *alignment);
/* Can holes be punched? 0, -EOPNOTSUPP ... */
int file_probe_punch(int fd);
/* cffi: end */

#endif
