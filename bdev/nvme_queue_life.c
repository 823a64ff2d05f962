/*
 * Queue pairs come and go: what the control process lends is mapped and checked, and a pair that is open
 * already is shared. All of a reactor's are found by their keys.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bdev/nvme_queue.h"

static struct nvme_queue *queues;

static uint64_t whole_pages(uint64_t bytes)
{
	return (bytes + NVME_PAGE_SIZE - 1) & ~(uint64_t)(NVME_PAGE_SIZE - 1);
}

void nvme_queue_layout(uint32_t depth, uint32_t bounces, struct nvme_queue_layout *layout)
{
	layout->submission = 0;
	layout->completion = whole_pages((uint64_t)depth * sizeof(struct nvme_command));
	layout->lists = layout->completion + whole_pages((uint64_t)depth * sizeof(struct nvme_completion));
	layout->bounce = layout->lists + (uint64_t)depth * NVME_PAGE_SIZE;
	layout->zeroes = layout->bounce + (uint64_t)bounces * NVME_BOUNCE_SIZE;
	layout->shared = layout->zeroes + NVME_BOUNCE_SIZE;
	layout->watch = layout->shared;
	layout->size = layout->watch + whole_pages(sizeof(struct nvme_watch) + depth * sizeof(uint64_t));
}

struct nvme_queue *nvme_queue_find(uint64_t key)
{
	struct nvme_queue *queue = queues;

	while (queue && queue->key != key) {
		queue = queue->next;
	}
	return queue;
}

static void destroy(struct nvme_queue *queue)
{
	int saved = errno;

	if (queue->poller.reactor) {
		poller_stop(&queue->poller);
		reactor_cancel(queue->reactor, &queue->ring);
	}
	if (queue->interrupt.fd >= 0) {
		close(fd_watch_stop(queue->reactor, &queue->interrupt));
	}
	if (queue->registers) {
		nvme_registers_unmap(queue->registers);
	}
	if (queue->shadow_map) {
		munmap(queue->shadow_map, 2 * NVME_PAGE_SIZE);
	}
	if (queue->memory) {
		munmap(queue->memory, queue->layout.size);
	}
	free(queue->bounce_free);
	free(queue->slots);
	free(queue);
	errno = saved;
}

static void *map_memory(int fd, size_t size)
{
	void *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	return map == MAP_FAILED ? NULL : map;
}

static void use_shadows(struct nvme_queue *queue, const struct nvme_queue_setup *setup)
{
	const uint32_t at[2] = {setup->submission_doorbell - NVME_REG_DOORBELLS,
				setup->completion_doorbell - NVME_REG_DOORBELLS};

	for (unsigned i = 0; i < 2; i++) {
		queue->shadow[i] = (volatile uint32_t *)((uint8_t *)queue->shadow_map + at[i]);
		queue->event[i] = (volatile uint32_t *)((uint8_t *)queue->shadow_map + NVME_PAGE_SIZE + at[i]);
	}
}

static int map_all(struct nvme_queue *queue, const struct nvme_queue_setup *setup)
{
	queue->memory = map_memory(setup->memory, queue->layout.size);
	if (!queue->memory) {
		return -errno;
	}
	if (setup->shadow >= 0) {
		queue->shadow_map = map_memory(setup->shadow, 2 * NVME_PAGE_SIZE);
		if (!queue->shadow_map) {
			return -errno;
		}
		use_shadows(queue, setup);
	}
	queue->registers = nvme_registers_map(setup->registers, setup->registers_offset, setup->registers_size);
	if (!queue->registers) {
		return -errno;
	}
	queue->submission = (struct nvme_command *)(queue->memory + queue->layout.submission);
	queue->completion = (volatile struct nvme_completion *)(queue->memory + queue->layout.completion);
	queue->watch = (struct nvme_watch *)(queue->memory + queue->layout.watch);
	queue->submission_doorbell = nvme_register_at(queue->registers, setup->submission_doorbell);
	queue->completion_doorbell = nvme_register_at(queue->registers, setup->completion_doorbell);
	return 0;
}

static int allocate(struct nvme_queue *queue)
{
	queue->slots = aligned_alloc(_Alignof(struct nvme_slot), (queue->depth - 1) * sizeof(*queue->slots));
	queue->bounce_free = calloc(queue->bounces, sizeof(*queue->bounce_free));
	if (!queue->slots || !queue->bounce_free) {
		return -ENOMEM;
	}
	for (uint32_t i = queue->depth - 1; i-- > 0;) {
		queue->slots[i] = (struct nvme_slot){.cid = (uint16_t)i, .next = queue->free};
		queue->free = &queue->slots[i];
	}
	queue->free_count = queue->depth - 1;
	while (queue->bounce_count < queue->bounces) {
		queue->bounce_free[queue->bounce_count] = (uint16_t)queue->bounce_count;
		queue->bounce_count++;
	}
	return 0;
}

static bool is_sane(const struct nvme_queue_setup *setup)
{
	return setup->depth >= 2 && setup->depth <= 65536 && setup->bounces >= 1 &&
	       setup->bounces < NVME_NO_BOUNCE && !(setup->iova & (NVME_PAGE_SIZE - 1)) &&
	       setup->submission_doorbell >= NVME_REG_DOORBELLS &&
	       setup->completion_doorbell > setup->submission_doorbell &&
	       setup->completion_doorbell + 4ULL <= setup->registers_size &&
	       (setup->shadow < 0 || setup->completion_doorbell + 4ULL <= NVME_REG_DOORBELLS + NVME_PAGE_SIZE);
}

/* epoll forgets a descriptor when the last copy of it is closed, and others have copies: ours is removed. */
static int watch_interrupt(struct nvme_queue *queue, int fd)
{
	int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	int rc;

	if (copy < 0) {
		return -errno;
	}
	queue->interrupt.fd = copy;
	rc = fd_watch_start(queue->reactor, &queue->interrupt);
	if (rc) {
		queue->interrupt.fd = -1;
		close(copy);
	}
	return rc;
}

static int create(struct nvme_queue *queue, const struct nvme_queue_setup *setup)
{
	int rc = map_all(queue, setup);

	if (rc == 0) {
		rc = allocate(queue);
	}
	if (rc == 0 && setup->interrupt >= 0) {
		rc = watch_interrupt(queue, setup->interrupt);
	}
	return rc;
}

struct nvme_queue *nvme_queue_get(struct reactor *reactor, const struct nvme_queue_setup *setup)
{
	struct nvme_queue *queue = nvme_queue_find(setup->key);
	int rc;

	if (queue) {
		queue->references++;
		return queue;
	}
	if (!is_sane(setup)) {
		errno = EINVAL;
		return NULL;
	}
	queue = calloc(1, sizeof(*queue));
	if (!queue) {
		return NULL;
	}
	queue->reactor = reactor;
	queue->key = setup->key;
	queue->references = 1;
	queue->depth = setup->depth;
	queue->bounces = setup->bounces;
	queue->iova = setup->iova;
	queue->direct = setup->direct;
	queue->sgl = setup->sgl;
	queue->retries = setup->retries < UINT8_MAX ? setup->retries : UINT8_MAX;
	nvme_queue_init(queue);
	nvme_queue_layout(queue->depth, queue->bounces, &queue->layout);
	rc = create(queue, setup);
	if (rc) {
		destroy(queue);
		errno = -rc;
		return NULL;
	}
	nvme_queue_begin(queue);
	queue->next = queues;
	queues = queue;
	return queue;
}

void nvme_queue_put(struct nvme_queue *queue)
{
	struct nvme_queue **link = &queues;

	if (--queue->references) {
		return;
	}
	while (*link != queue) {
		link = &(*link)->next;
	}
	*link = queue->next;
	destroy(queue);
}
