/*
 * The kernel's interface for devices that are driven from user space, linux/vfio.h: containers (an address
 * space of devices), groups (devices that the IOMMU cannot tell apart) and the devices themselves. One
 * function an ioctl, so that the kernel's header is the only place where its structures are described.
 *
 * All return -errno on failure; descriptors that they return are the caller's, and close-on-exec.
 */
#ifndef BDEV_VFIO_H
#define BDEV_VFIO_H

#include <stdbool.h>
#include <stdint.h>

/* cffi: begin */
#define VFIO_WINDOWS 32 /* ranges of addresses that vfio_windows() returns at most */

struct vfio_window {
	uint64_t first;
	uint64_t last; /* inclusive */
};

struct vfio_region {
	uint64_t size;
	uint64_t offset; /* in the device's descriptor */
	bool mappable;
};

/* A container, of an interface that this program knows. */
int vfio_container_open(void);
/* -EPERM: a device of the group has a driver other than VFIO's; -EBUSY: another program has it. */
int vfio_group_open(const char *path, int container);
/* Choose the kind of IOMMU, once a group is in the container. */
int vfio_iommu_choose(int container);
/* The addresses that devices may use: how many windows, or 0 where the kernel does not say. */
int vfio_windows(int container, struct vfio_window *windows);
/* @address and @size: whole pages, which are locked in memory until they are unmapped. */
int vfio_map(int container, const void *address, uint64_t size, uint64_t iova);
int vfio_unmap(int container, uint64_t iova, uint64_t size);

int vfio_device_open(int group, const char *name);
int vfio_device_reset(int device);
/* @index: 0 to 5 for BARs, VFIO_CONFIG for configuration space. */
int vfio_region_find(int device, uint32_t index, struct vfio_region *region);
/* How many MSI-X interrupts there are. */
int vfio_msix_count(int device);
/* Signal fds[i] (-1: nothing) upon interrupt i; @count 0 switches them off. */
int vfio_msix_set(int device, const int *fds, uint32_t count);
/* Signal @fd when the kernel wants the device back, and waits: it is being removed, or unbound. */
int vfio_request_set(int device, int fd);

#define VFIO_CONFIG 7
/* cffi: end */

#endif
