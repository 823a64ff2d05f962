#include "bdev/extent.h"

#include <errno.h>
#include <unistd.h>

bool bdev_sparse(const struct bdev *bdev)
{
	return bdev->sparse;
}

int bdev_extent(struct bdev *bdev, uint64_t offset, uint64_t *length)
{
	uint64_t left;
	int kind;

	if (bdev->removed) {
		return -ENODEV;
	}
	if (offset & (bdev->block_size - 1)) {
		return -EINVAL;
	}
	if (offset >= bdev->size) {
		return -ERANGE;
	}
	left = bdev->size - offset;
	*length = left;
	kind = bdev->sparse ? bdev->ops->extent(bdev, offset, length) : BDEV_MAPPED;
	if (*length > left) {
		*length = left;
	}
	return kind;
}

/*
 * lseek() moves the position of an open file that others have too, which nobody uses: all I/O names its offset.
 * What cannot tell (a block device, hugetlbfs) says that all is data.
 */
int extent_of_file(const struct bdev *bdev, int fd, uint64_t offset, uint64_t *length)
{
	uint64_t mask = bdev->block_size - 1;
	off_t data = lseek(fd, (off_t)offset, SEEK_DATA);
	off_t hole;

	if (data < 0) {
		switch (errno) {
		case ENXIO: /* no more data */
			return BDEV_HOLE;
		case EINVAL: /* the file system does not know SEEK_DATA */
			return BDEV_MAPPED;
		default:
			return -errno;
		}
	}
	if ((((uint64_t)data - offset) & ~mask) != 0) {
		*length = ((uint64_t)data - offset) & ~mask;
		return BDEV_HOLE;
	}
	hole = lseek(fd, data, SEEK_HOLE);
	if (hole < 0 && errno != ENXIO) {
		return -errno;
	}
	if (hole > data) {
		*length = ((uint64_t)hole - offset + mask) & ~mask;
	} else { /* somebody cuts or punches it right now */
		*length = mask + 1;
	}
	return BDEV_MAPPED;
}
