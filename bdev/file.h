/* A block device that is a regular file or a block device of the system, reached through io_uring. */
#ifndef BDEV_FILE_H
#define BDEV_FILE_H

#include "bdev/bdev.h"

/* cffi: begin */
struct file_setup {
	int fd; /* the handle's own once it is open */
	uint32_t block_size;
	uint64_t block_count;
	uint32_t memory_alignment; /* that O_DIRECT demands of buffers' addresses and lengths; else 1 */
	uint32_t offset_alignment; /* that O_DIRECT demands of offsets in the file; at most a block; else 1 */
	bool readonly;
	bool unmap; /* the file system can punch holes */
};

/* NULL and errno on failure: ENOSYS or EPERM where the system has io_uring switched off. */
struct bdev *file_bdev_open(struct reactor *reactor, uint64_t id, uint32_t slot,
			    const struct file_setup *setup);
/*
 * A descriptor, of the ring of this reactor's file disks: see uring_fence(). -ENODEV when there is none.
 */
int file_fence(struct reactor *reactor);
/* cffi: end */

#endif
