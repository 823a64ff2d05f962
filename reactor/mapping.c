#include "reactor/mapping.h"

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Every mapping of this process; changed and read (by the signal handler) on its one reactor thread. */
static struct mapping *mappings;

/* What offsets of a mapping of @fd must be a multiple of; 0 or -errno. */
static int page_size(int fd, uint64_t *page)
{
	struct stat st;

	if (fstat(fd, &st) < 0) {
		return -errno;
	}
	*page = (uint64_t)sysconf(_SC_PAGESIZE);
	/* hugetlbfs says the size of its pages in st_blksize. */
	if (S_ISREG(st.st_mode) && (uint64_t)st.st_blksize > *page) {
		*page = (uint64_t)st.st_blksize;
	}
	return 0;
}

int mapping_create(struct mapping *mapping, int fd, uint64_t offset, uint64_t size, bool *lost)
{
	uint64_t page, start;
	int rc = page_size(fd, &page);

	mapping->map = NULL;
	if (rc < 0) {
		return rc;
	}
	if (size == 0 || size > INT64_MAX - page || offset > INT64_MAX - page - size) {
		return -EINVAL;
	}
	start = offset - offset % page;
	mapping->map_size = (offset - start + size + page - 1) / page * page;
	mapping->map =
	    mmap(NULL, mapping->map_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, (off_t)start);
	if (mapping->map == MAP_FAILED) {
		mapping->map = NULL;
		return -errno;
	}
	madvise(mapping->map, mapping->map_size, MADV_DONTDUMP);
	mapping->data = (uint8_t *)mapping->map + (offset - start);
	mapping->lost = lost;
	mapping->next = mappings;
	mappings = mapping;
	return 0;
}

void mapping_swap(struct mapping *a, struct mapping *b)
{
	uint8_t *data = a->data;
	void *map = a->map;

	a->data = b->data;
	a->map = b->map;
	b->data = data;
	b->map = map;
}

void mapping_destroy(struct mapping *mapping)
{
	struct mapping **link = &mappings;

	if (mapping->map == NULL) {
		return;
	}
	while (*link != mapping) {
		link = &(*link)->next;
	}
	*link = mapping->next;
	munmap(mapping->map, mapping->map_size);
	mapping->map = NULL;
}

/*
 * Put anonymous zero pages in the place of the whole mapping, so that the interrupted access goes on, and
 * mark it lost, so that its owner stops. Only what is async-signal-safe happens here. A fault anywhere
 * else is a bug of ours: returning with the default action repeats the access, which then kills us.
 */
static void on_sigbus(int signal, siginfo_t *info, void *context)
{
	uintptr_t address = (uintptr_t)info->si_addr;
	int saved = errno;

	for (struct mapping *mapping = mappings; mapping != NULL; mapping = mapping->next) {
		if (address - (uintptr_t)mapping->map >= mapping->map_size) {
			continue;
		}
		__atomic_store_n(mapping->lost, true, __ATOMIC_RELAXED);
		if (mmap(mapping->map, mapping->map_size, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED) {
			errno = saved;
			return;
		}
	}
	struct sigaction action = {.sa_handler = SIG_DFL};

	sigaction(SIGBUS, &action, NULL);
	errno = saved;
}

int mapping_guard(void)
{
	struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER};

	sigemptyset(&action.sa_mask);
	return sigaction(SIGBUS, &action, NULL) < 0 ? -errno : 0;
}
