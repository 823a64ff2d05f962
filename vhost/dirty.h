/*
 * The dirty log of a live migration: a bitmap of the pages of guest memory, shared with the front-end, in
 * which the device sets the bit of every page that it has written to (vhost-user specification,
 * "Migration"). It belongs to a table of guest memory, since that tells where in the guest a byte is.
 *
 * A bit is set after its page was written: the front-end clears bits before it copies pages.
 */
#ifndef VHOST_DIRTY_H
#define VHOST_DIRTY_H

#include "vhost/memory.h"

/* cffi: begin */
#define DIRTY_PAGE_SIZE 4096 /* VHOST_LOG_PAGE: whatever the pages of guest and host are */

/*
 * Have a table of memory, which nobody uses yet, log to @size bytes from @offset of @fd, and signal
 * @event_fd (a non-blocking eventfd, or -1) when something was logged. Both stay the caller's. 0 or -errno.
 */
int guest_memory_log(struct guest_memory *memory, int fd, uint64_t offset, uint64_t size, int event_fd);
/* cffi: end */

struct dirty_log {
	struct mapping mapping;
	uint64_t pages; /* that have a bit */
	int event_fd;	/* ours, or -1 */
};

static inline bool guest_memory_logs(const struct guest_memory *memory)
{
	return memory->log != NULL;
}

/* The device has written to guest-physical [guest, guest + length). */
void dirty_guest(struct guest_memory *memory, uint64_t guest, uint64_t length);
/* The same for what is mapped at @host, in one region. */
void dirty_host(struct guest_memory *memory, const void *host, uint64_t length);
/* Tell the front-end that there is something new in the log. */
void dirty_signal(const struct guest_memory *memory);
/* Unmap and free; a no-op for NULL. */
void dirty_log_free(struct dirty_log *log);

#endif
