/*
 * Guest memory of which pages are still to come, in a post-copy migration (vhost-user specification,
 * "Migration"): an access to a page that the front-end does not have yet waits, in this thread or in the
 * kernel, until the front-end has put it there (userfaultfd(2)).
 */
#ifndef VHOST_POSTCOPY_H
#define VHOST_POSTCOPY_H

#include "vhost/memory.h"

/* cffi: begin */
/*
 * Make a userfaultfd of this process that also stops accesses of the kernel, such as those of an io_uring:
 * the descriptor, or -errno (-EPERM: neither CAP_SYS_PTRACE, vm.unprivileged_userfaultfd nor /dev/userfaultfd).
 */
int postcopy_open(void);
/*
 * Have region @index of @memory where @former, which nobody uses, has mapped the same region: its address has
 * been told. 0, or -ENOENT if it is not there.
 */
int postcopy_keep(struct guest_memory *memory, uint32_t index, struct guest_memory *former);
/* Have accesses to pages that are missing from @memory, which nobody has touched yet, wait. 0 or -errno. */
int postcopy_watch(struct guest_memory *memory, int fd);
/* cffi: end */

#endif
