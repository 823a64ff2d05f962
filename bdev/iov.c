#include "bdev/iov.h"

#include <string.h>

void iov_copy(const struct bdev_io *io, uint64_t skip, uint8_t *buffer, uint64_t length)
{
	for (const struct iovec *iov = io->iov; length; iov++) {
		uint64_t here;

		if (skip >= iov->iov_len) {
			skip -= iov->iov_len;
			continue;
		}
		here = iov->iov_len - skip < length ? iov->iov_len - skip : length;
		if (io->op == BDEV_WRITE) {
			memcpy(buffer, (uint8_t *)iov->iov_base + skip, here);
		} else {
			memcpy((uint8_t *)iov->iov_base + skip, buffer, here);
		}
		buffer += here;
		length -= here;
		skip = 0;
	}
}

void iov_zero(const struct bdev_io *io, uint64_t skip, uint64_t length)
{
	for (const struct iovec *iov = io->iov; length; iov++) {
		uint64_t here;

		if (skip >= iov->iov_len) {
			skip -= iov->iov_len;
			continue;
		}
		here = iov->iov_len - skip < length ? iov->iov_len - skip : length;
		memset((uint8_t *)iov->iov_base + skip, 0, here);
		length -= here;
		skip = 0;
	}
}
