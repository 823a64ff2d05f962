#include "benchmarks/bare.h"

#include <poll.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64

static uint8_t *host(const struct bare_device *device, uint64_t guest)
{
	return device->memory + (guest - device->guest);
}

/* Serve one request: three descriptors in the ring, in order, as the load generator lays them out. */
static inline uint32_t serve(const struct bare_device *device, const struct vring_desc *chain)
{
	const struct {
		uint32_t type, reserved;
		uint64_t sector;
	} *header = (void *)host(device, chain[0].addr);
	bool write = header->type == 1;

	if (device->store) {
		uint8_t *at = device->store + header->sector * 512;
		uint8_t *data = host(device, chain[1].addr);

		memcpy(write ? at : data, write ? data : at, chain[1].len);
	}
	*host(device, chain[2].addr) = 0;
	return write ? 1 : chain[1].len + 1;
}

/* A kick is never lost: an eventfd stays readable until it is read, and the ring is looked at after that. */
static void wait_for_kick(int kick)
{
	struct pollfd waiting = {.fd = kick, .events = POLLIN};
	uint64_t kicks;

	if (poll(&waiting, 1, -1) < 0 || read(kick, &kicks, sizeof(kicks)) < 0) {
		return;
	}
}

void bare_serve(struct bare_device *device)
{
	struct vring_desc *desc = device->desc;
	struct vring_avail *avail = device->avail;
	struct vring_used *used = device->used;
	uint16_t mask = (uint16_t)(device->size - 1);
	uint16_t taken = __atomic_load_n(&used->idx, __ATOMIC_ACQUIRE);

	while (!__atomic_load_n(&device->stop, __ATOMIC_RELAXED)) {
		uint16_t ready = (uint16_t)(__atomic_load_n(&avail->idx, __ATOMIC_ACQUIRE) - taken);
		uint16_t batch = ready < BATCH ? ready : BATCH;

		for (uint16_t i = 0; i < batch; i++) {
			uint16_t head = avail->ring[(taken + i) & mask];

			__builtin_prefetch(host(device, desc[head].addr), 1);
		}
		for (uint16_t i = 0; i < batch; i++) {
			uint16_t head = avail->ring[(taken + i) & mask];

			used->ring[(taken + i) & mask] =
			    (struct vring_used_elem){.id = head, .len = serve(device, &desc[head])};
		}
		if (batch) {
			taken = (uint16_t)(taken + batch);
			__atomic_store_n(&used->idx, taken, __ATOMIC_RELEASE);
		} else if (device->kick >= 0) {
			wait_for_kick(device->kick);
		}
	}
}

double bare_memcpy(uint8_t *store, uint64_t size, uint8_t *buffers, uint32_t block, uint32_t depth, bool write,
		   double seconds)
{
	struct timespec start, now;
	uint64_t random = 88172645463325252u;
	uint64_t blocks = size / block;
	uint64_t copied = 0;
	double elapsed;

	clock_gettime(CLOCK_MONOTONIC, &start);
	do {
		for (uint32_t i = 0; i < 1024; i++, copied++) {
			random ^= random << 13;
			random ^= random >> 7;
			random ^= random << 17;
			uint8_t *buffer = buffers + (uint64_t)(copied % depth) * block;
			uint8_t *at = store + random % blocks * block;

			memcpy(write ? at : buffer, write ? buffer : at, block);
			__asm__ volatile("" ::: "memory");
		}
		clock_gettime(CLOCK_MONOTONIC, &now);
		elapsed = (double)(now.tv_sec - start.tv_sec) + (double)(now.tv_nsec - start.tv_nsec) * 1e-9;
	} while (elapsed < seconds);
	return (double)copied / elapsed;
}
