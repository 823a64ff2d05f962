#include "vhost/postcopy.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define DEVICE "/dev/userfaultfd"

#ifndef USERFAULTFD_IOC_NEW /* Linux 6.1 */
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

/* By the device where the system call is not allowed: who may open that may do it. */
static int make_fd(void)
{
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	int device;

	if (fd >= 0 || errno != EPERM) {
		return fd < 0 ? -errno : fd;
	}
	device = open(DEVICE, O_RDWR | O_CLOEXEC);
	if (device < 0) {
		return -EPERM;
	}
	fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
	if (fd < 0) {
		fd = -errno;
	}
	close(device);
	return fd;
}

int postcopy_open(void)
{
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};
	int fd = make_fd();

	if (fd >= 0 && ioctl(fd, UFFDIO_API, &api) < 0) {
		int rc = -errno;

		close(fd);
		return rc;
	}
	return fd;
}

int postcopy_keep(struct guest_memory *memory, uint32_t index, struct guest_memory *former)
{
	struct mapped_region *region = &memory->regions[index];

	for (uint32_t i = 0; i < former->count; i++) {
		struct mapped_region *same = &former->regions[i];

		if (same->guest == region->guest && same->mapping.map_size == region->mapping.map_size) {
			mapping_swap(&region->mapping, &same->mapping);
			region->host = region->mapping.data;
			same->host = same->mapping.data;
			return 0;
		}
	}
	return -ENOENT;
}

static int watch(const struct mapping *mapping, int fd)
{
	struct uffdio_register area = {
	    .range = {.start = (uintptr_t)mapping->map, .len = mapping->map_size},
	    .mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	if (ioctl(fd, UFFDIO_REGISTER, &area) < 0) {
		return -errno;
	}
	/* Of files that are no memory the kernel registers none. What cannot be filled would wait for ever. */
	return area.ioctls & (1ull << _UFFDIO_COPY) ? 0 : -EOPNOTSUPP;
}

int postcopy_watch(struct guest_memory *memory, int fd)
{
	for (uint32_t i = 0; i < memory->count; i++) {
		int rc = watch(&memory->regions[i].mapping, fd);

		if (rc < 0) {
			return rc;
		}
	}
	return 0;
}
