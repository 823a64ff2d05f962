#include "bdev/fence.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096

struct fence {
	struct fence *next;
	const struct reactor *reactor;
	int fd;
	unsigned references;
};

static struct fence *fences; /* one a reactor, and a process has one reactor */

/* What points at the fence of @reactor, or at the end of the list. */
static struct fence **find(const struct reactor *reactor)
{
	struct fence **link = &fences;

	while (*link && (*link)->reactor != reactor) {
		link = &(*link)->next;
	}
	return link;
}

static int make(struct fence **link, const struct reactor *reactor)
{
	struct fence *fence = calloc(1, sizeof(*fence));
	int rc = -ENOMEM;

	if (!fence) {
		return rc;
	}
	fence->reactor = reactor;
	fence->fd = memfd_create("kernel-io-fence", MFD_CLOEXEC);
	if (fence->fd >= 0 && ftruncate(fence->fd, PAGE) == 0) {
		*link = fence;
		return 0;
	}
	rc = -errno;
	if (fence->fd >= 0) {
		close(fence->fd);
	}
	free(fence);
	return rc;
}

int fence_get(struct reactor *reactor)
{
	struct fence **link = find(reactor);
	int rc = *link ? 0 : make(link, reactor);

	if (rc) {
		return rc;
	}
	(*link)->references++;
	return (*link)->fd;
}

void fence_put(struct reactor *reactor)
{
	struct fence **link = find(reactor);
	struct fence *fence = *link;

	if (--fence->references == 0) {
		*link = fence->next;
		close(fence->fd);
		free(fence);
	}
}

int fence_find(const struct reactor *reactor)
{
	const struct fence *fence = *find(reactor);

	return fence ? fence->fd : -ENODEV;
}

int fence_lock(int file)
{
	char path[32];
	int fd;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0) {
		return -errno;
	}
	if (flock(fd, LOCK_SH | LOCK_NB) < 0) {
		int rc = -errno;

		close(fd);
		return rc;
	}
	return fd;
}

void *fence_map(int file)
{
	int fd = fence_lock(file);
	void *page;

	if (fd < 0) {
		errno = -fd;
		return NULL;
	}
	page = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
	close(fd); /* the mapping refers to the description, and so to the lock */
	return page == MAP_FAILED ? NULL : page;
}

void fence_unmap(void *page)
{
	munmap(page, PAGE);
}
