#include "bdev/vfio.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

_Static_assert(VFIO_CONFIG == VFIO_PCI_CONFIG_REGION_INDEX, "as the kernel has it");

#define VECTORS_MAX 2048 /* that MSI-X can have */

/* What an ioctl returned, or -errno. */
static int result(int rc)
{
	return rc < 0 ? -errno : rc;
}

int vfio_container_open(void)
{
	int fd = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC);

	if (fd < 0) {
		return -errno;
	}
	if (ioctl(fd, VFIO_GET_API_VERSION) != VFIO_API_VERSION ||
	    ioctl(fd, VFIO_CHECK_EXTENSION, VFIO_TYPE1v2_IOMMU) != 1) {
		close(fd);
		return -EOPNOTSUPP;
	}
	return fd;
}

int vfio_group_open(const char *path, int container)
{
	struct vfio_group_status status = {.argsz = sizeof(status)};
	int fd = open(path, O_RDWR | O_CLOEXEC);
	int rc;

	if (fd < 0) {
		return -errno;
	}
	rc = result(ioctl(fd, VFIO_GROUP_GET_STATUS, &status));
	if (rc >= 0 && !(status.flags & VFIO_GROUP_FLAGS_VIABLE)) {
		rc = -EPERM;
	}
	if (rc >= 0) {
		rc = result(ioctl(fd, VFIO_GROUP_SET_CONTAINER, &container));
	}
	if (rc < 0) {
		close(fd);
		return rc;
	}
	return fd;
}

int vfio_iommu_choose(int container)
{
	return result(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU));
}

static const struct vfio_info_cap_header *find_capability(const struct vfio_iommu_type1_info *info,
							  uint32_t size, uint16_t id)
{
	uint32_t at = info->flags & VFIO_IOMMU_INFO_CAPS ? info->cap_offset : 0;

	while (at && at + sizeof(struct vfio_info_cap_header) <= size) {
		const struct vfio_info_cap_header *header = (const void *)((const uint8_t *)info + at);

		if (header->id == id) {
			return header;
		}
		at = header->next;
	}
	return NULL;
}

static int copy_windows(const struct vfio_iommu_type1_info *info, uint32_t size, struct vfio_window *windows)
{
	const struct vfio_iommu_type1_info_cap_iova_range *found =
	    (const void *)find_capability(info, size, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE);
	int count = 0;

	while (found && count < (int)found->nr_iovas && count < VFIO_WINDOWS) {
		windows[count].first = found->iova_ranges[count].start;
		windows[count].last = found->iova_ranges[count].end;
		count++;
	}
	return count;
}

int vfio_windows(int container, struct vfio_window *windows)
{
	struct vfio_iommu_type1_info head = {.argsz = sizeof(head)};
	struct vfio_iommu_type1_info *info;
	int rc = result(ioctl(container, VFIO_IOMMU_GET_INFO, &head));

	if (rc < 0 || head.argsz <= sizeof(head)) {
		return rc < 0 ? rc : 0;
	}
	info = calloc(1, head.argsz);
	if (!info) {
		return -ENOMEM;
	}
	info->argsz = head.argsz;
	rc = result(ioctl(container, VFIO_IOMMU_GET_INFO, info));
	if (rc >= 0) {
		rc = copy_windows(info, head.argsz, windows);
	}
	free(info);
	return rc;
}

int vfio_map(int container, const void *address, uint64_t size, uint64_t iova)
{
	struct vfio_iommu_type1_dma_map map = {
	    .argsz = sizeof(map),
	    .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
	    .vaddr = (uintptr_t)address,
	    .iova = iova,
	    .size = size,
	};

	return result(ioctl(container, VFIO_IOMMU_MAP_DMA, &map));
}

int vfio_unmap(int container, uint64_t iova, uint64_t size)
{
	struct vfio_iommu_type1_dma_unmap unmap = {.argsz = sizeof(unmap), .iova = iova, .size = size};

	return result(ioctl(container, VFIO_IOMMU_UNMAP_DMA, &unmap));
}

int vfio_device_open(int group, const char *name)
{
	int fd = result(ioctl(group, VFIO_GROUP_GET_DEVICE_FD, name));

	if (fd >= 0) {
		fcntl(fd, F_SETFD, FD_CLOEXEC);
	}
	return fd;
}

int vfio_device_reset(int device)
{
	return result(ioctl(device, VFIO_DEVICE_RESET));
}

int vfio_region_find(int device, uint32_t index, struct vfio_region *region)
{
	struct vfio_region_info info = {.argsz = sizeof(info), .index = index};
	int rc = result(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &info));

	region->size = info.size;
	region->offset = info.offset;
	region->mappable = info.flags & VFIO_REGION_INFO_FLAG_MMAP;
	return rc;
}

int vfio_msix_count(int device)
{
	struct vfio_irq_info info = {.argsz = sizeof(info), .index = VFIO_PCI_MSIX_IRQ_INDEX};
	int rc = result(ioctl(device, VFIO_DEVICE_GET_IRQ_INFO, &info));

	return rc < 0 ? rc : (int)info.count;
}

static int set_interrupts(int device, uint32_t index, const int *fds, uint32_t count)
{
	struct vfio_irq_set *set;
	int rc;

	if (count > VECTORS_MAX) {
		return -EINVAL;
	}
	set = calloc(1, sizeof(*set) + count * sizeof(*fds));
	if (!set) {
		return -ENOMEM;
	}
	set->argsz = (uint32_t)(sizeof(*set) + count * sizeof(*fds));
	set->flags = VFIO_IRQ_SET_ACTION_TRIGGER | (count ? VFIO_IRQ_SET_DATA_EVENTFD : VFIO_IRQ_SET_DATA_NONE);
	set->index = index;
	set->count = count;
	memcpy(set->data, fds, count * sizeof(*fds));
	rc = result(ioctl(device, VFIO_DEVICE_SET_IRQS, set));
	free(set);
	return rc;
}

int vfio_msix_set(int device, const int *fds, uint32_t count)
{
	return set_interrupts(device, VFIO_PCI_MSIX_IRQ_INDEX, fds, count);
}

int vfio_request_set(int device, int fd)
{
	return set_interrupts(device, VFIO_PCI_REQ_IRQ_INDEX, &fd, 1);
}
