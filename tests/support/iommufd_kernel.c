/*
 * /dev/iommu and a device's file of VFIO as far as a process sees them, for kernels that have neither:
 * preloaded, it answers open() and ioctl() of these and logs what was asked, by the offsets of linux/iommufd.h
 * and linux/vfio.h of Linux 6.6, to the file IOMMUFD_LOG. IOMMUFD_REFUSE is the number of a request that fails.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define SPACE 7

static int iommufd = -1, device = -1;

static uint32_t u32(const void *at, unsigned offset)
{
	uint32_t value;

	memcpy(&value, (const char *)at + offset, sizeof(value));
	return value;
}

static uint64_t u64(const void *at, unsigned offset)
{
	uint64_t value;

	memcpy(&value, (const char *)at + offset, sizeof(value));
	return value;
}

static void put32(void *at, unsigned offset, uint32_t value)
{
	memcpy((char *)at + offset, &value, sizeof(value));
}

static int refuse(int error)
{
	errno = error;
	return -1;
}

static int windows(void *arg)
{
	uint64_t *ranges = (uint64_t *)(uintptr_t)u64(arg, 16);

	if (u32(arg, 4) != SPACE || u32(arg, 8) < 2) {
		return refuse(EMSGSIZE);
	}
	ranges[0] = 0;
	ranges[1] = 0xfedfffff;
	ranges[2] = 0xfef00000;
	ranges[3] = 0x7fffffffff;
	put32(arg, 8, 2);
	return 0;
}

static int answer(unsigned long request, void *arg, FILE *log)
{
	switch (request) {
	case 0x3b81: /* IOMMU_IOAS_ALLOC */
		fprintf(log, "alloc %u %u\n", u32(arg, 0), u32(arg, 4));
		put32(arg, 8, SPACE);
		return 0;
	case 0x3b84: /* IOMMU_IOAS_IOVA_RANGES */
		fprintf(log, "ranges %u %u\n", u32(arg, 0), u32(arg, 12));
		return windows(arg);
	case 0x3b85: /* IOMMU_IOAS_MAP */
		fprintf(log, "map %u %#x %u %u %#lx %#lx\n", u32(arg, 0), u32(arg, 4), u32(arg, 8),
			u32(arg, 12), u64(arg, 24), u64(arg, 32));
		return *(volatile char *)(uintptr_t)u64(arg, 16) == 'x' ? 0 : refuse(EFAULT);
	case 0x3b86: /* IOMMU_IOAS_UNMAP */
		fprintf(log, "unmap %u %u %#lx %#lx\n", u32(arg, 0), u32(arg, 4), u64(arg, 8), u64(arg, 16));
		return 0;
	case 0x3b76: /* VFIO_DEVICE_BIND_IOMMUFD */
		fprintf(log, "bind %u %u %d\n", u32(arg, 0), u32(arg, 4), (int)u32(arg, 8) == iommufd);
		put32(arg, 12, 1);
		return 0;
	case 0x3b77: /* VFIO_DEVICE_ATTACH_IOMMUFD_PT */
		fprintf(log, "attach %u %u %u\n", u32(arg, 0), u32(arg, 4), u32(arg, 8));
		return 0;
	default:
		return refuse(ENOTTY);
	}
}

int ioctl(int fd, unsigned long request, ...)
{
	static int (*real)(int, unsigned long, ...);
	const char *path = getenv("IOMMUFD_LOG"), *refused = getenv("IOMMUFD_REFUSE");
	va_list more;
	void *arg;
	FILE *log;
	int rc;

	va_start(more, request);
	arg = va_arg(more, void *);
	va_end(more);
	if (fd < 0 || (fd != iommufd && fd != device)) {
		real = real ? real : (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
		return real(fd, request, arg);
	}
	if (refused && request == strtoul(refused, NULL, 0)) {
		return refuse(ENODEV);
	}
	log = fopen(path ? path : "/dev/null", "a");
	rc = answer(request, arg, log);
	fclose(log);
	return rc;
}

int open(const char *path, int flags, ...)
{
	static int (*real)(const char *, int, ...);
	va_list more;
	int mode;

	va_start(more, flags);
	mode = va_arg(more, int);
	va_end(more);
	if (!strcmp(path, "/dev/iommu")) {
		return iommufd = memfd_create("iommu", MFD_CLOEXEC);
	}
	if (strstr(path, "/dev/vfio/devices/vfio")) {
		return device = memfd_create("device", MFD_CLOEXEC);
	}
	real = real ? real : (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open");
	return real(path, flags, mode);
}
