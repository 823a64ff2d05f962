/*
 * Requests complete inside submit(): one memcpy() an iovec. The C library's memcpy() was measured against
 * rep movsb and hand-written AVX loops for random 4 KiB out of 64 MiB, and none was faster; what did help,
 * by a fifth, is touching the beginning of the next request while this one is copied: bdev_prefetch().
 */
#include "bdev/malloc.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bdev/extent.h"
#include "bdev/iov.h"

#define TRANSPARENT_HUGE_PAGE (2UL << 20)
#define EXTENT_MAX (1UL << 20)

struct malloc_bdev {
	struct bdev bdev;
	uint8_t *memory;
	size_t map_size;
	uintptr_t page_mask;
	bool reserved; /* hugetlbfs */
	int fd;
};

static void copy_out(const uint8_t *memory, const struct bdev_io *io)
{
	if (io->iovcnt == 1) {
		memcpy(io->iov->iov_base, memory, io->length);
		return;
	}
	for (uint32_t i = 0; i < io->iovcnt; i++) {
		memcpy(io->iov[i].iov_base, memory, io->iov[i].iov_len);
		memory += io->iov[i].iov_len;
	}
}

static void copy_in(uint8_t *memory, const struct bdev_io *io)
{
	if (io->iovcnt == 1) {
		memcpy(memory, io->iov->iov_base, io->length);
		return;
	}
	for (uint32_t i = 0; i < io->iovcnt; i++) {
		memcpy(memory, io->iov[i].iov_base, io->iov[i].iov_len);
		memory += io->iov[i].iov_len;
	}
}

/* Make a range read as zeroes; whole pages of it go back to the system. */
static void zero(const struct malloc_bdev *disk, uint8_t *from, uint64_t length)
{
	uint8_t *end = from + length;
	uint8_t *first = (uint8_t *)(((uintptr_t)from + disk->page_mask) & ~disk->page_mask);
	uint8_t *last = (uint8_t *)((uintptr_t)end & ~disk->page_mask);

	if (disk->reserved || first >= last || madvise(first, last - first, MADV_REMOVE)) {
		memset(from, 0, length);
		return;
	}
	memset(from, 0, first - from);
	memset(last, 0, end - last);
}

static void malloc_submit(struct bdev *bdev, struct bdev_io *io)
{
	struct malloc_bdev *disk = (struct malloc_bdev *)bdev;
	uint8_t *memory = disk->memory + io->offset;
	int status = 0;

	switch (io->op) {
	case BDEV_READ:
		copy_out(memory, io);
		break;
	case BDEV_WRITE:
		copy_in(memory, io);
		break;
	case BDEV_UNMAP:
	case BDEV_WRITE_ZEROES:
		zero(disk, memory, io->length);
		break;
	case BDEV_COPY:
		memmove(memory, disk->memory + io->source, io->length);
		break;
	case BDEV_COMPARE:
		io->miscompare = iov_compare(io, 0, memory, io->length);
		status = io->miscompare < io->length ? -EILSEQ : 0;
		break;
	}
	bdev_complete(io, status);
}

static void malloc_close(struct bdev *bdev)
{
	struct malloc_bdev *disk = (struct malloc_bdev *)bdev;

	munmap(disk->memory, disk->map_size);
	close(disk->fd);
	free(disk);
}

static bool is_zero(const uint8_t *block, uint32_t size)
{
	return block[0] == 0 && memcmp(block, block + 1, size - 1) == 0;
}

/* The same as extent_of_file() of blocks that have memory; looks at EXTENT_MAX bytes of them at most. */
static int extent_of_memory(const struct malloc_bdev *disk, uint64_t offset, uint64_t *length)
{
	const uint8_t *memory = disk->memory + offset;
	uint32_t size = disk->bdev.block_size;
	uint64_t most = *length < EXTENT_MAX ? *length : EXTENT_MAX;
	bool hole = is_zero(memory, size);
	uint64_t at = size;

	while (at < most && is_zero(memory + at, size) == hole) {
		at += size;
	}
	*length = at;
	return hole ? BDEV_HOLE : BDEV_MAPPED;
}

static int malloc_extent(struct bdev *bdev, uint64_t offset, uint64_t *length)
{
	struct malloc_bdev *disk = (struct malloc_bdev *)bdev;
	int kind = extent_of_file(bdev, disk->fd, offset, length);

	/* What was only read has memory too, from the page fault on: there it is the contents that tell. */
	return kind == BDEV_MAPPED ? extent_of_memory(disk, offset, length) : kind;
}

/* Addresses at a multiple of @alignment, so that huge pages fit, with nothing there. MAP_FAILED and errno. */
static uint8_t *reserve(size_t size, size_t alignment)
{
	uint8_t *space =
	    mmap(NULL, size + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint8_t *aligned;

	if (space == MAP_FAILED) {
		return MAP_FAILED;
	}
	aligned = (uint8_t *)(((uintptr_t)space + alignment - 1) & ~(alignment - 1));
	munmap(space, aligned - space);
	munmap(aligned + size, space + alignment - aligned);
	return aligned;
}

static uint8_t *map_aligned(size_t size, size_t alignment, int fd)
{
	uint8_t *space = reserve(size, alignment);
	uint8_t *map;

	if (space == MAP_FAILED) {
		return MAP_FAILED;
	}
	map = mmap(space, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
	if (map == MAP_FAILED) {
		int error = errno;

		munmap(space, size);
		errno = error;
	}
	return map;
}

/*
 * The memfd has grown: map all of it, somewhere else. Nothing is in flight that could have an address: requests
 * complete in submit(). Pages beyond the end of a disk that shrank stay mapped.
 */
static int malloc_resize(struct bdev *bdev, uint64_t bytes)
{
	struct malloc_bdev *disk = (struct malloc_bdev *)bdev;
	uint64_t size = (bytes + disk->page_mask) & ~(uint64_t)disk->page_mask;
	uint8_t *space;

	if (size <= disk->map_size) {
		return 0;
	}
	space = reserve(size, TRANSPARENT_HUGE_PAGE);
	if (space == MAP_FAILED) {
		return -errno;
	}
	if (mremap(disk->memory, disk->map_size, size, MREMAP_MAYMOVE | MREMAP_FIXED, space) == MAP_FAILED) {
		int error = errno;

		munmap(space, size);
		return -error;
	}
	disk->memory = space;
	disk->map_size = size;
	bdev->memory = space;
	return 0;
}

static const struct bdev_ops malloc_ops = {
    .submit = malloc_submit,
    .resize = malloc_resize,
    .extent = malloc_extent,
    .close = malloc_close,
};

struct bdev *malloc_bdev_open(struct reactor *reactor, uint64_t id, uint32_t slot, uint32_t block_size,
			      uint64_t block_count, int fd, uint64_t page_size)
{
	const uint32_t all = BDEV_DEVICE_OPS | 1U << BDEV_COMPARE | 1U << BDEV_COPY;
	uint64_t page = page_size ? page_size : (uint64_t)sysconf(_SC_PAGESIZE);
	uint64_t size = (block_count * block_size + page - 1) & ~(page - 1);
	struct malloc_bdev *disk = malloc(sizeof(*disk));

	if (!disk) {
		return NULL;
	}
	*disk = (struct malloc_bdev){.map_size = size, .page_mask = page - 1, .reserved = page_size != 0};
	disk->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	if (disk->fd < 0) {
		int error = errno;

		free(disk);
		errno = error;
		return NULL;
	}
	disk->memory = map_aligned(size, page_size ? page_size : TRANSPARENT_HUGE_PAGE, fd);
	if (disk->memory == MAP_FAILED) {
		int error = errno;

		close(disk->fd);
		free(disk);
		errno = error;
		return NULL;
	}
	/* A wish: shared memory has transparent huge pages only where shmem_enabled says so. */
	madvise(disk->memory, size, MADV_HUGEPAGE);
	bdev_init(&disk->bdev, &malloc_ops, reactor, id, slot, block_size, block_count, all, false);
	disk->bdev.memory = disk->memory;
	disk->bdev.sparse = true;
	return &disk->bdev;
}

int malloc_bdev_discard(int fd, uint64_t from)
{
	struct stat memory;

	if (fstat(fd, &memory)) {
		return -errno;
	}
	if (from < (uint64_t)memory.st_size && fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
							 (off_t)from, memory.st_size - (off_t)from)) {
		return -errno;
	}
	return 0;
}
