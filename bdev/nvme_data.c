#include "bdev/nvme_data.h"

#include <stdbool.h>
#include <string.h>

#include "bdev/dma.h"

#define PAGE_MASK (NVME_PAGE_SIZE - 1)

/* The end of a list of PRPs: with one more page its address stands in the command itself. */
static void finish_prps(struct nvme_command *command, uint32_t length, struct nvme_list list)
{
	uint32_t pages = (uint32_t)((command->prp1 & PAGE_MASK) + length + PAGE_MASK) / NVME_PAGE_SIZE;

	if (pages <= 1) {
		command->prp2 = 0;
	} else if (pages == 2) {
		command->prp2 = *(const uint64_t *)list.page;
	} else {
		command->prp2 = list.iova;
	}
}

/* A run of device addresses that is being taken apart into pages. */
struct prp_run {
	uint64_t *entries;
	uint32_t count;
	uint32_t covered; /* bytes */
	uint64_t end;	  /* of what is covered */
};

/* Whether a piece at @iova may follow what the run has. */
static bool may_follow(const struct prp_run *run, uint64_t iova)
{
	if (run->covered == 0) {
		return !(iova & 3);
	}
	return iova == run->end || !((iova | run->end) & PAGE_MASK);
}

/* Returns how many of @length bytes at @iova found room. */
static uint32_t add_pages(struct prp_run *run, uint64_t iova, uint32_t length)
{
	uint64_t page = (iova + PAGE_MASK) & ~(uint64_t)PAGE_MASK;

	if (run->covered == 0) {
		page = (iova & ~(uint64_t)PAGE_MASK) + NVME_PAGE_SIZE; /* the first has prp1 */
	}
	for (; page < iova + length; page += NVME_PAGE_SIZE) {
		if (run->count == NVME_LIST_PRPS) {
			return (uint32_t)(page - iova);
		}
		run->entries[run->count++] = page;
	}
	return length;
}

uint32_t nvme_describe_prps(struct nvme_command *command, const struct bdev_io *io, uint64_t skip,
			    uint32_t limit, uint32_t block, struct nvme_list list)
{
	const struct iovec *end = io->iov + io->iovcnt;
	struct prp_run run = {.entries = list.page};

	for (const struct iovec *iov = io->iov; iov < end && run.covered < limit; iov++) {
		uint64_t iova, here = iov->iov_len;
		uint32_t added;

		if (skip >= here) {
			skip -= here;
			continue;
		}
		here -= skip;
		if (here > limit - run.covered) {
			here = limit - run.covered;
		}
		if (!dma_translate((uint8_t *)iov->iov_base + skip, here, &iova) || !may_follow(&run, iova)) {
			break;
		}
		skip = 0;
		added = add_pages(&run, iova, (uint32_t)here);
		if (run.covered == 0) {
			command->prp1 = iova;
		}
		run.covered += added;
		run.end = iova + added;
		if (added < here) {
			break;
		}
	}
	run.covered &= ~(block - 1);
	if (run.covered) {
		finish_prps(command, run.covered, list);
	}
	return run.covered;
}

void nvme_describe_one(struct nvme_command *command, uint64_t iova, uint32_t length, struct nvme_list list)
{
	struct prp_run run = {.entries = list.page};

	command->prp1 = iova;
	add_pages(&run, iova, length);
	finish_prps(command, length, list);
}

/* Drop the last @excess bytes of @count descriptors; returns how many are left. */
static uint32_t trim(struct nvme_sgl *sgls, uint32_t count, uint32_t excess)
{
	while (excess) {
		struct nvme_sgl *last = &sgls[count - 1];
		uint32_t here = excess < last->length ? excess : last->length;

		last->length -= here;
		excess -= here;
		if (!last->length) {
			count--;
		}
	}
	return count;
}

uint32_t nvme_describe_sgls(struct nvme_command *command, const struct bdev_io *io, uint64_t skip,
			    uint32_t limit, uint32_t block, uint32_t alignment, struct nvme_list list)
{
	const struct iovec *end = io->iov + io->iovcnt;
	struct nvme_sgl *sgls = list.page;
	struct nvme_sgl in_command;
	uint32_t covered = 0, count = 0;

	for (const struct iovec *iov = io->iov; iov < end && covered < limit && count < NVME_LIST_SGLS; iov++) {
		uint64_t iova, here = iov->iov_len;

		if (skip >= here) {
			skip -= here;
			continue;
		}
		here -= skip;
		if (here > limit - covered) {
			here = limit - covered;
		}
		if (!dma_translate((uint8_t *)iov->iov_base + skip, here, &iova) ||
		    ((iova | here) & (alignment - 1))) {
			break;
		}
		skip = 0;
		sgls[count++] = (struct nvme_sgl){.address = iova, .length = (uint32_t)here};
		covered += (uint32_t)here;
	}
	count = trim(sgls, count, covered & (block - 1));
	covered &= ~(block - 1);
	if (!covered) {
		return 0;
	}
	in_command = count == 1 ? sgls[0]
				: (struct nvme_sgl){.address = list.iova,
						    .length = count * (uint32_t)sizeof(*sgls),
						    .type = NVME_SGL_LAST_SEGMENT};
	command->flags |= NVME_USES_SGL;
	memcpy(&command->prp1, &in_command, sizeof(in_command));
	return covered;
}
