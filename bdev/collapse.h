/*
 * Transparent huge pages for memory that is shared: what is full is put into pages of 2 MiB, whatever
 * /sys/kernel/mm/transparent_hugepage/shmem_enabled says (MADV_COLLAPSE, Linux 6.1 and later). A random read of
 * 4 KiB then costs a page walk less, which in a virtual machine is a walk in two dimensions.
 */
#ifndef BDEV_COLLAPSE_H
#define BDEV_COLLAPSE_H

#include <stdint.h>

/* cffi: begin */
#define COLLAPSE_EXTENT 2097152

/*
 * Put up to @most extents of a memfd into huge pages; those that have a hole are left alone, so no memory is
 * taken that was not there. @done has a byte for each of @count extents: not 0 where it is in a huge page,
 * which is not looked at again; this function sets and clears them.
 *
 * The number of extents that were collapsed, or -errno: -EINVAL where the system cannot do it.
 */
int collapse_memory(int fd, uint8_t *done, uint64_t count, int most);
/* cffi: end */

#endif
