#include "vhost/dirty.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

int guest_memory_log(struct guest_memory *memory, int fd, uint64_t offset, uint64_t size, int event_fd)
{
	struct dirty_log *log;
	int rc;

	if (memory->log != NULL || size > UINT64_MAX / 8) {
		return -EINVAL;
	}
	log = calloc(1, sizeof(*log));
	if (log == NULL) {
		return -ENOMEM;
	}
	log->pages = size * 8;
	log->event_fd = event_fd < 0 ? -1 : fcntl(event_fd, F_DUPFD_CLOEXEC, 0);
	rc = event_fd >= 0 && log->event_fd < 0 ? -errno : 0;
	if (rc == 0) {
		rc = mapping_create(&log->mapping, fd, offset, size, &memory->lost);
	}
	if (rc < 0) {
		dirty_log_free(log);
		return rc;
	}
	memory->log = log;
	return 0;
}

void dirty_log_free(struct dirty_log *log)
{
	if (log == NULL) {
		return;
	}
	mapping_destroy(&log->mapping);
	if (log->event_fd >= 0) {
		close(log->event_fd);
	}
	free(log);
}

void dirty_guest(struct guest_memory *memory, uint64_t guest, uint64_t length)
{
	const struct dirty_log *log = memory->log;
	uint64_t page, last;

	if (log == NULL || length == 0) {
		return;
	}
	last = (guest + length - 1) / DIRTY_PAGE_SIZE;
	/* The control process has seen to it that every page has a bit; a bad log must not hurt us. */
	for (page = guest / DIRTY_PAGE_SIZE; page <= last && page < log->pages; page++) {
		__atomic_fetch_or(&log->mapping.data[page / 8], 1u << page % 8, __ATOMIC_SEQ_CST);
	}
}

void dirty_host(struct guest_memory *memory, const void *host, uint64_t length)
{
	for (uint32_t i = 0; i < memory->count; i++) {
		const struct mapped_region *region = &memory->regions[i];
		uint64_t offset = (uint64_t)((uintptr_t)host - (uintptr_t)region->host);

		if (offset < region->size) {
			dirty_guest(memory, region->guest + offset, length);
			return;
		}
	}
}

void dirty_signal(const struct guest_memory *memory)
{
	uint64_t one = 1;

	/* EAGAIN means that it is signalled already. */
	if (memory->log != NULL && memory->log->event_fd >= 0 &&
	    write(memory->log->event_fd, &one, sizeof(one)) < 0) {
		return;
	}
}
