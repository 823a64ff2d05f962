#include "bdev/iov.h"

#include <string.h>

/* Step over the iovecs: the next piece, of @left bytes at most, of what follows @skip bytes. */
struct walk {
	const struct iovec *iov;
	uint64_t skip;
};

static uint8_t *next_piece(struct walk *walk, uint64_t left, uint64_t *length)
{
	uint8_t *here;

	while (walk->skip >= walk->iov->iov_len) {
		walk->skip -= walk->iov->iov_len;
		walk->iov++;
	}
	here = (uint8_t *)walk->iov->iov_base + walk->skip;
	*length = walk->iov->iov_len - walk->skip < left ? walk->iov->iov_len - walk->skip : left;
	walk->skip += *length;
	return here;
}

void iov_gather(const struct bdev_io *io, uint64_t skip, uint8_t *buffer, uint64_t length)
{
	struct walk walk = {io->iov, skip};

	for (uint64_t here; length; buffer += here, length -= here) {
		const uint8_t *piece = next_piece(&walk, length, &here);

		memcpy(buffer, piece, here);
	}
}

void iov_copy(const struct bdev_io *io, uint64_t skip, uint8_t *buffer, uint64_t length)
{
	struct walk walk = {io->iov, skip};

	if (io->op == BDEV_WRITE) {
		iov_gather(io, skip, buffer, length);
		return;
	}
	for (uint64_t here; length; buffer += here, length -= here) {
		uint8_t *piece = next_piece(&walk, length, &here);

		memcpy(piece, buffer, here);
	}
}

/* How many bytes are the same. The second may be a guest's memory, which it changes when it likes. */
static uint64_t same_bytes(const uint8_t *a, const uint8_t *b, uint64_t length)
{
	uint64_t same = 0;

	if (memcmp(a, b, length) == 0) {
		return length;
	}
	while (same < length && a[same] == b[same]) {
		same++;
	}
	return same;
}

uint64_t iov_compare(const struct bdev_io *io, uint64_t skip, const uint8_t *buffer, uint64_t length)
{
	struct walk walk = {io->iov, skip};
	uint64_t done = 0;

	for (uint64_t here, same; done < length; done += here) {
		const uint8_t *piece = next_piece(&walk, length - done, &here);

		same = same_bytes(buffer + done, piece, here);
		if (same < here) {
			return done + same;
		}
	}
	return length;
}

void iov_zero(const struct bdev_io *io, uint64_t skip, uint64_t length)
{
	struct walk walk = {io->iov, skip};

	for (uint64_t here; length; length -= here) {
		uint8_t *piece = next_piece(&walk, length, &here);

		memset(piece, 0, here);
	}
}
