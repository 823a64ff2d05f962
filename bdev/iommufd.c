/*
 * The structures stand here because linux/iommufd.h, and these requests of linux/vfio.h, are younger than the
 * headers of systems that this is built on. They are part of the kernel's interface and do not change.
 */
#include "bdev/iommufd.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* Requests of /dev/iommu: the size of the structure comes first, which lets it grow. */
#define IOMMU_REQUEST(number) _IO(';', 0x80 + (number))
#define SPACE_ALLOCATE IOMMU_REQUEST(1)
#define SPACE_RANGES IOMMU_REQUEST(4)
#define SPACE_MAP IOMMU_REQUEST(5)
#define SPACE_UNMAP IOMMU_REQUEST(6)

struct space_allocate {
	uint32_t size;
	uint32_t flags;
	uint32_t space;
};

struct space_ranges {
	uint32_t size;
	uint32_t space;
	uint32_t count; /* that there is room for; and that there are */
	uint32_t reserved;
	uint64_t ranges;
	uint64_t alignment;
};

#define MAP_FIXED_ADDRESS 0x1
#define MAP_WRITABLE 0x2
#define MAP_READABLE 0x4

struct space_map {
	uint32_t size;
	uint32_t flags;
	uint32_t space;
	uint32_t reserved;
	uint64_t address;
	uint64_t length;
	uint64_t iova;
};

struct space_unmap {
	uint32_t size;
	uint32_t space;
	uint64_t iova;
	uint64_t length;
};

/* Requests of the device's file. */
#define DEVICE_BIND _IO(VFIO_TYPE, VFIO_BASE + 18)
#define DEVICE_ATTACH _IO(VFIO_TYPE, VFIO_BASE + 19)

struct device_bind {
	uint32_t size;
	uint32_t flags;
	int32_t iommufd;
	uint32_t device;
};

struct device_attach {
	uint32_t size;
	uint32_t flags;
	uint32_t space;
};

_Static_assert(sizeof(struct space_allocate) == 12, "struct iommu_ioas_alloc");
_Static_assert(sizeof(struct space_ranges) == 32, "struct iommu_ioas_iova_ranges");
_Static_assert(offsetof(struct space_ranges, ranges) == 16, "struct iommu_ioas_iova_ranges");
_Static_assert(sizeof(struct space_map) == 40, "struct iommu_ioas_map");
_Static_assert(offsetof(struct space_map, address) == 16, "struct iommu_ioas_map");
_Static_assert(sizeof(struct space_unmap) == 24, "struct iommu_ioas_unmap");
_Static_assert(sizeof(struct device_bind) == 16, "struct vfio_device_bind_iommufd");
_Static_assert(sizeof(struct device_attach) == 12, "struct vfio_device_attach_iommufd_pt, as it began");
_Static_assert(sizeof(struct vfio_window) == 16, "struct iommu_iova_range");
#ifdef VFIO_DEVICE_BIND_IOMMUFD
_Static_assert(DEVICE_BIND == VFIO_DEVICE_BIND_IOMMUFD, "as the kernel has it");
_Static_assert(DEVICE_ATTACH == VFIO_DEVICE_ATTACH_IOMMUFD_PT, "as the kernel has it");
#endif

static int result(int rc)
{
	return rc < 0 ? -errno : rc;
}

int iommufd_open(void)
{
	return result(open("/dev/iommu", O_RDWR | O_CLOEXEC));
}

int iommufd_create_space(int iommufd, uint32_t *space)
{
	struct space_allocate allocate = {.size = sizeof(allocate)};
	int rc = result(ioctl(iommufd, SPACE_ALLOCATE, &allocate));

	*space = allocate.space;
	return rc;
}

int iommufd_windows(int iommufd, uint32_t space, struct vfio_window *windows)
{
	struct space_ranges ranges = {
	    .size = sizeof(ranges),
	    .space = space,
	    .count = VFIO_WINDOWS,
	    .ranges = (uintptr_t)windows,
	};
	int rc = result(ioctl(iommufd, SPACE_RANGES, &ranges));

	if (rc == -EMSGSIZE) {
		return VFIO_WINDOWS; /* there are more, which nobody needs */
	}
	return rc < 0 ? rc : (int)ranges.count;
}

int iommufd_map(int iommufd, uint32_t space, const void *address, uint64_t size, uint64_t iova)
{
	struct space_map map = {
	    .size = sizeof(map),
	    .flags = MAP_FIXED_ADDRESS | MAP_WRITABLE | MAP_READABLE,
	    .space = space,
	    .address = (uintptr_t)address,
	    .length = size,
	    .iova = iova,
	};

	return result(ioctl(iommufd, SPACE_MAP, &map));
}

int iommufd_unmap(int iommufd, uint32_t space, uint64_t iova, uint64_t size)
{
	struct space_unmap unmap = {.size = sizeof(unmap), .space = space, .iova = iova, .length = size};

	return result(ioctl(iommufd, SPACE_UNMAP, &unmap));
}

int iommufd_open_device(const char *path, int iommufd, uint32_t space)
{
	struct device_bind bind = {.size = sizeof(bind), .iommufd = iommufd};
	struct device_attach attach = {.size = sizeof(attach), .space = space};
	int device = open(path, O_RDWR | O_CLOEXEC);
	int rc;

	if (device < 0) {
		return -errno;
	}
	rc = result(ioctl(device, DEVICE_BIND, &bind));
	if (rc >= 0) {
		rc = result(ioctl(device, DEVICE_ATTACH, &attach));
	}
	if (rc < 0) {
		close(device);
		return rc;
	}
	return device;
}
