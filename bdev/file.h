/* A block device that is a regular file or a block device of the system. */
#ifndef BDEV_FILE_H
#define BDEV_FILE_H

#include "bdev/bdev.h"
#include "bdev/kernel_io.h"

/* cffi: begin */
struct file_setup {
	int fd; /* the handle's own once it is open */
	uint32_t block_size;
	uint64_t block_count;
	uint32_t memory_alignment; /* that O_DIRECT demands of buffers' addresses and lengths; else 1 */
	uint32_t offset_alignment; /* that O_DIRECT demands of offsets in the file; at most a block; else 1 */
	bool readonly;
	bool unmap; /* the file system can punch holes */
	enum kernel_io_kind engine;
};

/* NULL and errno on failure: ENOSYS or EPERM where the system does not allow the engine. */
struct bdev *file_bdev_open(struct reactor *reactor, uint64_t id, uint32_t slot,
			    const struct file_setup *setup);
/*
 * A descriptor, which stays ours, of what tells whether anything that file disks have begun can still happen:
 * see bdev/fence.h. -ENODEV when there is none.
 */
int file_fence(struct reactor *reactor);

#define FILE_BUFFER_MAX 1073741824 /* bytes of one registered buffer */

/*
 * Pin this memory and register it with the io_uring of this reactor's file disks: requests whose buffer lies in
 * it are cheaper. 0; -ENOMEM where RLIMIT_MEMLOCK forbids it; -EFAULT or -EOPNOTSUPP for memory that cannot be
 * pinned (a mapped file that is neither shared memory nor of hugetlbfs); -EINVAL for more than FILE_BUFFER_MAX
 * and on kernels before 5.19; -EEXIST, -ENOSPC. To be removed, once no request uses it, before it is unmapped.
 */
int file_buffer_add(struct reactor *reactor, void *address, uint64_t size);
/* @address as it was added. 0 or -ENOENT. */
int file_buffer_remove(struct reactor *reactor, void *address);
/* How many operations have used a registered buffer since the ring was made. */
uint64_t file_buffer_uses(struct reactor *reactor);
/* cffi: end */

#endif
