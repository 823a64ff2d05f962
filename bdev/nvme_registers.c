#include "bdev/nvme_registers.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "reactor/mapping.h"

struct nvme_registers {
	struct mapping mapping;
	bool lost;
};

struct nvme_registers *nvme_registers_map(int fd, uint64_t offset, uint64_t size)
{
	struct nvme_registers *registers = calloc(1, sizeof(*registers));
	int rc;

	if (!registers) {
		return NULL;
	}
	rc = mapping_guard();
	if (rc == 0) {
		rc = mapping_create(&registers->mapping, fd, offset, size, &registers->lost);
	}
	if (rc < 0) {
		free(registers);
		errno = -rc;
		return NULL;
	}
	return registers;
}

void nvme_registers_unmap(struct nvme_registers *registers)
{
	mapping_destroy(&registers->mapping);
	free(registers);
}

volatile uint32_t *nvme_register_at(struct nvme_registers *registers, uint32_t at)
{
	return (volatile uint32_t *)(registers->mapping.data + at);
}

uint32_t nvme_read32(const struct nvme_registers *registers, uint32_t at)
{
	return *(volatile uint32_t *)(registers->mapping.data + at);
}

/* In two halves, which every controller takes (Base 3.1.1); the low one first. */
uint64_t nvme_read64(const struct nvme_registers *registers, uint32_t at)
{
	uint64_t low = nvme_read32(registers, at);

	return low | (uint64_t)nvme_read32(registers, at + 4) << 32;
}

void nvme_write32(struct nvme_registers *registers, uint32_t at, uint32_t value)
{
	/* What was written to memory before is there when the device looks. */
	atomic_thread_fence(memory_order_release);
	*nvme_register_at(registers, at) = value;
}

void nvme_write64(struct nvme_registers *registers, uint32_t at, uint64_t value)
{
	nvme_write32(registers, at, (uint32_t)value);
	nvme_write32(registers, at + 4, (uint32_t)(value >> 32));
}

bool nvme_registers_lost(const struct nvme_registers *registers)
{
	return __atomic_load_n(&registers->lost, __ATOMIC_RELAXED);
}
