/*
 * Both descriptions are made in two steps: how many bytes of the request they can cover, which settles how
 * many entries there will be and so the shape of the lists; then the entries.
 */
#include "bdev/nvme_data.h"

#include <string.h>

#include "bdev/dma.h"

#define PAGE_MASK (NVME_PAGE_SIZE - 1)
#define PRPS ((uint32_t)(NVME_PAGE_SIZE / sizeof(uint64_t))) /* in a page */
#define SGLS ((uint32_t)(NVME_PAGE_SIZE / sizeof(struct nvme_sgl)))

/* --- the pieces of a request ------------------------------------------------------------------------ */

struct piece {
	uint64_t iova;
	uint64_t length;
};

struct walk {
	const struct iovec *iov;
	const struct iovec *end;
	uint64_t skip;
	uint64_t left;
};

static struct walk walk_begin(const struct bdev_io *io, uint64_t skip, uint64_t limit)
{
	struct walk walk = {.iov = io->iov, .end = io->iov + io->iovcnt, .skip = skip, .left = limit};

	while (walk.iov < walk.end && walk.skip >= walk.iov->iov_len) {
		walk.skip -= walk.iov++->iov_len;
	}
	return walk;
}

/* The next piece; false after the last, and before one that the device does not see. */
static bool walk_next(struct walk *walk, struct piece *piece)
{
	while (walk->iov < walk->end && walk->left) {
		uint8_t *at = (uint8_t *)walk->iov->iov_base + walk->skip;
		uint64_t length = walk->iov->iov_len - walk->skip;

		walk->iov++;
		walk->skip = 0;
		if (length == 0) {
			continue;
		}
		piece->length = length < walk->left ? length : walk->left;
		walk->left -= piece->length;
		return dma_translate(at, piece->length, &piece->iova);
	}
	return false;
}

/* --- PRPs ------------------------------------------------------------------------------------------- */

/* How many bytes a first PRP with this offset in its page and full lists describe. */
static uint64_t prp_room(const struct nvme_list *list, uint64_t offset)
{
	/* The last entry of a page that is followed by another one is its address. */
	uint64_t entries = list->more ? (PRPS - 1) * NVME_MORE_PAGES + PRPS : PRPS;

	return (entries + 1) * NVME_PAGE_SIZE - offset;
}

/* How many bytes PRPs can describe, at most @limit; *@first is where they begin. */
static uint32_t measure_prps(const struct bdev_io *io, uint64_t skip, uint32_t limit,
			     const struct nvme_list *list, uint64_t *first)
{
	struct walk walk = walk_begin(io, skip, limit);
	uint64_t covered = 0, end = 0, room;
	struct piece piece;

	while (walk_next(&walk, &piece)) {
		if (covered == 0 && (piece.iova & 3)) {
			break;
		}
		if (covered && piece.iova != end && ((piece.iova | end) & PAGE_MASK)) {
			break;
		}
		*first = covered ? *first : piece.iova;
		covered += piece.length;
		end = piece.iova + piece.length;
	}
	room = covered ? prp_room(list, *first & PAGE_MASK) : 0;
	return (uint32_t)(covered < room ? covered : room);
}

/* A list that is being written: entries of which so many are to come. */
struct prp_list {
	uint64_t *at;
	uint32_t in_page; /* entries that fit before the page's end */
	uint32_t left;
	uint64_t *next_page;
	uint64_t next_iova;
};

static void write_prp(struct prp_list *list, uint64_t page)
{
	if (list->in_page == 1 && list->left > 1) {
		*list->at = list->next_iova;
		list->at = list->next_page;
		list->in_page = PRPS;
		list->next_page += PRPS;
		list->next_iova += NVME_PAGE_SIZE;
	}
	*list->at++ = page;
	list->in_page--;
	list->left--;
}

/* Write an entry for each page that begins in the piece, but for the page of the very first byte. */
static void write_pages(struct prp_list *list, struct piece piece, bool first)
{
	uint64_t page = first ? (piece.iova | PAGE_MASK) + 1 : (piece.iova + PAGE_MASK) & ~(uint64_t)PAGE_MASK;

	for (; page < piece.iova + piece.length; page += NVME_PAGE_SIZE) {
		write_prp(list, page);
	}
}

static struct prp_list begin_prps(struct nvme_command *command, uint64_t first, uint32_t length,
				  struct nvme_list *list)
{
	uint32_t entries = (uint32_t)((first & PAGE_MASK) + length - 1) / NVME_PAGE_SIZE;

	command->prp1 = first;
	command->prp2 = entries > 1 ? list->iova : 0;
	list->more_used = entries > PRPS;
	return (struct prp_list){
	    .at = entries > 1 ? list->page : &command->prp2, /* a single one stands in the command */
	    .in_page = PRPS,
	    .left = entries,
	    .next_page = list->more,
	    .next_iova = list->more_iova,
	};
}

uint32_t nvme_describe_prps(struct nvme_command *command, const struct bdev_io *io, uint64_t skip,
			    uint32_t limit, uint32_t block, struct nvme_list *list)
{
	uint64_t first = 0;
	uint32_t length = measure_prps(io, skip, limit, list, &first) & ~(block - 1);
	struct prp_list entries;
	struct piece piece;
	struct walk walk;

	if (!length) {
		return 0;
	}
	entries = begin_prps(command, first, length, list);
	walk = walk_begin(io, skip, length);
	for (bool is_first = true; walk_next(&walk, &piece); is_first = false) {
		write_pages(&entries, piece, is_first);
	}
	return length;
}

void nvme_describe_one(struct nvme_command *command, uint64_t iova, uint32_t length, struct nvme_list *list)
{
	struct prp_list entries = begin_prps(command, iova, length, list);

	write_pages(&entries, (struct piece){iova, length}, true);
}

/* --- SGLs ------------------------------------------------------------------------------------------- */

/* How many bytes SGLs can describe, at most @limit, with how many descriptors. */
static uint32_t measure_sgls(const struct bdev_io *io, uint64_t skip, uint32_t limit, uint32_t alignment,
			     const struct nvme_list *list, uint32_t *count)
{
	uint32_t room = list->more ? SGLS - 1 + SGLS * NVME_MORE_PAGES : SGLS;
	struct walk walk = walk_begin(io, skip, limit);
	struct piece piece;
	uint32_t covered = 0;

	for (*count = 0; *count < room && walk_next(&walk, &piece); (*count)++) {
		if ((piece.iova | piece.length) & (alignment - 1)) {
			break;
		}
		covered += (uint32_t)piece.length;
	}
	return covered;
}

static struct nvme_sgl segment(uint8_t type, uint64_t iova, uint32_t count)
{
	return (struct nvme_sgl){
	    .address = iova, .length = count * (uint32_t)sizeof(struct nvme_sgl), .type = type};
}

/* Where the first descriptor goes, and in *@in_command what points there. */
static struct nvme_sgl *begin_sgls(struct nvme_sgl *in_command, uint32_t count, struct nvme_list *list)
{
	struct nvme_sgl *page = list->page;

	list->more_used = count > SGLS;
	if (count == 1) {
		return in_command;
	}
	if (count <= SGLS) {
		*in_command = segment(NVME_SGL_LAST_SEGMENT, list->iova, count);
		return page;
	}
	/* Two segments: the last descriptor of the first one points to the second, which is the last. */
	*in_command = segment(NVME_SGL_SEGMENT, list->iova, SGLS);
	page[SGLS - 1] = segment(NVME_SGL_LAST_SEGMENT, list->more_iova, count - (SGLS - 1));
	return page;
}

uint32_t nvme_describe_sgls(struct nvme_command *command, const struct bdev_io *io, uint64_t skip,
			    uint32_t limit, uint32_t block, uint32_t alignment, struct nvme_list *list)
{
	struct nvme_sgl in_command, *at;
	struct piece piece;
	struct walk walk;
	uint32_t count, length = measure_sgls(io, skip, limit, alignment, list, &count);

	if (length & (block - 1)) {
		length = measure_sgls(io, skip, length & ~(block - 1), alignment, list, &count);
	}
	if (!length) {
		return 0;
	}
	at = begin_sgls(&in_command, count, list);
	walk = walk_begin(io, skip, length);
	for (uint32_t i = 0; i < count && walk_next(&walk, &piece); i++) {
		if (i == SGLS - 1 && list->more_used) {
			at = list->more;
		}
		*at++ = (struct nvme_sgl){.address = piece.iova, .length = (uint32_t)piece.length};
	}
	command->flags |= NVME_USES_SGL;
	memcpy(&command->prp1, &in_command, sizeof(in_command));
	return length;
}
