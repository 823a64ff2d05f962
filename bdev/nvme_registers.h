/*
 * The registers of an NVMe controller: its BAR 0, mapped. Everything that touches them goes through here,
 * so that anything that can be mapped may stand in for a BAR.
 *
 * A device that is pulled out answers reads with all ones, or the kernel takes the mapping away and the
 * next access raises SIGBUS; reactor/mapping.h then puts ordinary memory in its place.
 */
#ifndef BDEV_NVME_REGISTERS_H
#define BDEV_NVME_REGISTERS_H

#include <stdbool.h>
#include <stdint.h>

/* cffi: begin */
struct nvme_registers;

/* Map @size bytes of @fd, which stays the caller's. NULL and errno. */
struct nvme_registers *nvme_registers_map(int fd, uint64_t offset, uint64_t size);
void nvme_registers_unmap(struct nvme_registers *registers);
/* @at: a multiple of the width, below the size. */
uint32_t nvme_read32(const struct nvme_registers *registers, uint32_t at);
uint64_t nvme_read64(const struct nvme_registers *registers, uint32_t at);
void nvme_write32(struct nvme_registers *registers, uint32_t at, uint32_t value);
void nvme_write64(struct nvme_registers *registers, uint32_t at, uint64_t value);
/* True once an access found the mapping gone. */
bool nvme_registers_lost(const struct nvme_registers *registers);
/* cffi: end */

volatile uint32_t *nvme_register_at(struct nvme_registers *registers, uint32_t at);

#endif
