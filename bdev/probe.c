#include "bdev/probe.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define LARGEST 4096

static int ask(int fd, struct direct_alignment *alignment)
{
#ifdef STATX_DIOALIGN /* Linux 6.1; not every file system answers */
	struct statx found;

	if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &found)) {
		return -errno;
	}
	if (found.stx_mask & STATX_DIOALIGN) {
		alignment->memory = found.stx_dio_mem_align;
		alignment->offset = found.stx_dio_offset_align;
		return alignment->offset ? 0 : -EOPNOTSUPP;
	}
#endif
	return -ENODATA;
}

/* Read one unit, at an address and an offset that are multiples of it and of nothing larger. */
static int try(int fd, uint8_t *buffer, uint32_t unit)
{
	ssize_t n;

	do {
		n = pread(fd, buffer + unit, unit, unit);
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : 0;
}

int file_probe_direct(int fd, struct direct_alignment *alignment)
{
	int rc = ask(fd, alignment);
	uint8_t *buffer;

	if (rc != -ENODATA) {
		return rc;
	}
	buffer = aligned_alloc(LARGEST, 2 * LARGEST);
	if (!buffer) {
		return -ENOMEM;
	}
	rc = -EINVAL;
	for (uint32_t unit = 512; rc == -EINVAL && unit <= LARGEST; unit *= 8) {
		*alignment = (struct direct_alignment){.memory = unit, .offset = unit};
		rc = try(fd, buffer, unit);
	}
	free(buffer);
	return rc == -EINVAL ? -EOPNOTSUPP : rc;
}

int file_probe_punch(int fd)
{
	/* Beyond the end there is nothing to lose, and the file system answers nevertheless. */
	off_t end = lseek(fd, 0, SEEK_END);

	if (end < 0) {
		return -errno;
	}
	end = (end + LARGEST - 1) & ~(off_t)(LARGEST - 1);
	return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, end, LARGEST) ? -errno : 0;
}
