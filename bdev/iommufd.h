/*
 * The kernel's newer interface for devices that are driven from user space (Linux 6.6 with VFIO_DEVICE_CDEV):
 * an address space is an object of /dev/iommu, and a device a file of its own that is bound to it; there are
 * neither containers nor groups to open. Regions and interrupts of the device are those of bdev/vfio.h.
 *
 * All return -errno on failure; descriptors that they return are the caller's, and close-on-exec.
 */
#ifndef BDEV_IOMMUFD_H
#define BDEV_IOMMUFD_H

#include <stdint.h>

#include "bdev/vfio.h"

/* cffi: begin */
/* /dev/iommu. */
int iommufd_open(void);
/* Make an empty address space; its number, which goes with the descriptor. */
int iommufd_create_space(int iommufd, uint32_t *space);
/* The addresses that all devices of the space may use: how many windows, VFIO_WINDOWS at most. */
int iommufd_windows(int iommufd, uint32_t space, struct vfio_window *windows);
/* @address and @size: whole pages, which are locked in memory until they are unmapped. */
int iommufd_map(int iommufd, uint32_t space, const void *address, uint64_t size, uint64_t iova);
int iommufd_unmap(int iommufd, uint32_t space, uint64_t iova, uint64_t size);
/* The device /dev/vfio/devices/vfioN, in the space until its descriptor is closed. */
int iommufd_open_device(const char *path, int iommufd, uint32_t space);
/* cffi: end */

#endif
