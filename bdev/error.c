/*
 * Faults, where tests and operators want them. A request that is not hit goes straight on; what is hit may
 * allocate, unlike the data path of every other device, because this is the one that is meant to be slow.
 */
#include "bdev/error.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "bdev/detour.h"
#include "bdev/stacked.h"

#define RETRY_NS 100000
#define ALIGNMENT 4096

_Static_assert(BDEV_OPS == sizeof(((struct error_rules *)0)->rule) / sizeof(struct error_rule),
	       "one rule an operation");

struct list {
	struct bdev_io *first, **end;
};

struct error_bdev {
	struct stacked stacked;
	struct error_rules *rules;
	struct list pending;
	struct list starved; /* of resources, as it seems */
	struct timer retry;
	uint32_t chance; /* state of the generator */
};

/* A write whose data is changed: its memory belongs to the guest, who must not see that. */
struct changed {
	struct iovec iov;
	uint8_t *data;
};

static const char changed_when_read;

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

static void append(struct list *list, struct bdev_io *io)
{
	io->next = NULL;
	*list->end = io;
	list->end = &io->next;
}

/* The whole list; it is empty after. */
static struct bdev_io *take_all(struct list *list)
{
	struct bdev_io *first = list->first;

	list->first = NULL;
	list->end = &list->first;
	return first;
}

static void complete_all(struct list *list, int status)
{
	for (struct bdev_io *io = take_all(list), *next; io; io = next) {
		next = io->next;
		bdev_complete(io, status);
	}
}

static uint32_t next_chance(struct error_bdev *disk)
{
	uint32_t x = disk->chance; /* Marsaglia's xorshift32 */

	x ^= x << 13;
	x ^= x >> 17;
	x ^= x << 5;
	return disk->chance = x;
}

/* Take one of the requests that are left to be hit; every reactor takes from the same number. */
static bool take_one(struct error_rule *rule)
{
	uint64_t left = __atomic_load_n(&rule->left, __ATOMIC_RELAXED);

	do {
		if (left == ERROR_NO_END) {
			return true;
		}
		if (left == 0) {
			return false;
		}
	} while (!__atomic_compare_exchange_n(&rule->left, &left, left - 1, true, __ATOMIC_RELAXED,
					      __ATOMIC_RELAXED));
	return true;
}

static enum error_type choose(struct error_bdev *disk, const struct bdev_io *io)
{
	struct error_rule *rule = &disk->rules->rule[io->op];
	uint32_t type = __atomic_load_n(&rule->type, __ATOMIC_ACQUIRE);

	if (type == ERROR_NONE || disk->stacked.bdev.in_flight < rule->queue_depth ||
	    (rule->rate != 0 && next_chance(disk) >= rule->rate) || !take_one(rule)) {
		return ERROR_NONE;
	}
	return type;
}

static void flip(const struct bdev_io *io, const struct error_rule *rule)
{
	uint64_t offset = rule->corrupt_offset;

	for (uint32_t i = 0; i < io->iovcnt; i++) {
		if (offset < io->iov[i].iov_len) {
			((uint8_t *)io->iov[i].iov_base)[offset] ^= (uint8_t)rule->corrupt_value;
			return;
		}
		offset -= io->iov[i].iov_len;
	}
}

static struct changed *change(const struct bdev_io *io, const struct error_rule *rule)
{
	struct changed *changed = malloc(sizeof(*changed));
	uint64_t at = 0;

	if (!changed || posix_memalign((void **)&changed->data, ALIGNMENT, io->length)) {
		free(changed);
		return NULL;
	}
	for (uint32_t i = 0; i < io->iovcnt; i++) {
		memcpy(changed->data + at, io->iov[i].iov_base, io->iov[i].iov_len);
		at += io->iov[i].iov_len;
	}
	if (rule->corrupt_offset < io->length) {
		changed->data[rule->corrupt_offset] ^= (uint8_t)rule->corrupt_value;
	}
	changed->iov = (struct iovec){.iov_base = changed->data, .iov_len = io->length};
	return changed;
}

/* Carry @io out; scratch[0] says what happens to its data. */
static void carry_out(struct bdev *bdev, struct bdev_io *io)
{
	struct stacked *stacked = (struct stacked *)bdev;
	struct changed *changed = io->op == BDEV_WRITE ? io->scratch[0] : NULL;
	struct child_io *child = children_take(&stacked->children, io);

	if (child) {
		child->io.bdev = stacked->base;
		child->io.iov = changed ? &changed->iov : io->iov;
		child->io.iovcnt = changed ? 1 : io->iovcnt;
		child->io.offset = io->offset;
		child->io.length = io->length;
		bdev_submit(&child->io);
	}
}

static void error_ended(struct bdev *bdev, struct bdev_io *io, int status)
{
	struct error_bdev *disk = (struct error_bdev *)bdev;

	if (io->scratch[0] == &changed_when_read) {
		flip(io, &disk->rules->rule[BDEV_READ]);
	} else if (io->scratch[0]) {
		struct changed *changed = io->scratch[0];

		free(changed->data);
		free(changed);
	}
	bdev_complete(io, status);
}

static void corrupt(struct error_bdev *disk, struct bdev_io *io)
{
	if (io->op == BDEV_READ) {
		io->scratch[0] = (void *)&changed_when_read;
	} else {
		io->scratch[0] = change(io, &disk->rules->rule[io->op]);
		if (!io->scratch[0]) {
			bdev_complete(io, -ENOMEM);
			return;
		}
	}
	carry_out(&disk->stacked.bdev, io);
}

static void starve(struct error_bdev *disk, struct bdev_io *io)
{
	struct reactor *reactor = disk->stacked.bdev.reactor;

	if (!disk->retry.place &&
	    timer_set(reactor, &disk->retry, reactor_now(reactor) + reactor_ns_to_ticks(RETRY_NS))) {
		bdev_complete(io, -ENOMEM);
		return;
	}
	append(&disk->starved, io);
}

static void error_submit(struct bdev *bdev, struct bdev_io *io)
{
	struct error_bdev *disk = (struct error_bdev *)bdev;

	io->scratch[0] = NULL;
	switch (choose(disk, io)) {
	case ERROR_FAILURE:
		bdev_complete(io, -EIO);
		return;
	case ERROR_PENDING:
		append(&disk->pending, io);
		return;
	case ERROR_CORRUPT:
		corrupt(disk, io);
		return;
	case ERROR_NOMEM:
		starve(disk, io);
		return;
	default:
		break;
	}
	if (io->op == BDEV_RESET) {
		/* It would wait for ever. */
		complete_all(&disk->pending, -ECANCELED);
		bdev_complete_when_quiet(io);
		return;
	}
	carry_out(bdev, io);
}

static void retry(struct timer *timer)
{
	struct error_bdev *disk = container_of(timer, struct error_bdev, retry);

	for (struct bdev_io *io = take_all(&disk->starved), *next; io; io = next) {
		next = io->next;
		error_submit(&disk->stacked.bdev, io);
	}
}

static int error_abort(struct bdev *bdev, struct bdev_io *io)
{
	struct error_bdev *disk = (struct error_bdev *)bdev;

	if (detour_unlink(&disk->pending.first, &disk->pending.end, io) ||
	    detour_unlink(&disk->starved.first, &disk->starved.end, io)) {
		bdev_complete(io, -ECANCELED);
		return 0;
	}
	return stacked_abort(bdev, io);
}

static void error_remove(struct bdev *bdev)
{
	struct error_bdev *disk = (struct error_bdev *)bdev;

	timer_clear(bdev->reactor, &disk->retry);
	complete_all(&disk->pending, -ENODEV);
	complete_all(&disk->starved, -ENODEV);
}

static void error_close(struct bdev *bdev)
{
	struct error_bdev *disk = (struct error_bdev *)bdev;

	timer_clear(bdev->reactor, &disk->retry);
	munmap(disk->rules, sizeof(*disk->rules));
	stacked_close(bdev);
}

static const struct bdev_ops error_ops = {
    .submit = error_submit,
    .remove = error_remove,
    .abort = error_abort,
    .extent = stacked_extent,
    .close = error_close,
};

void error_bdev_resume(struct bdev *bdev)
{
	struct error_bdev *disk = (struct error_bdev *)bdev;

	for (struct bdev_io *io = take_all(&disk->pending), *next; io; io = next) {
		next = io->next;
		if (io->op == BDEV_RESET) {
			bdev_complete_when_quiet(io);
		} else {
			carry_out(bdev, io);
		}
	}
}

struct bdev *error_bdev_open(uint64_t id, uint32_t slot, uint64_t block_count, struct bdev *base, int fd,
			     uint32_t seed)
{
	struct error_rules *rules = mmap(NULL, sizeof(*rules), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	struct error_bdev *disk;

	if (rules == MAP_FAILED) {
		return NULL;
	}
	disk = stacked_over(sizeof(*disk), base, &error_ops, id, slot, block_count);
	if (!disk) {
		munmap(rules, sizeof(*rules));
		errno = ENOMEM;
		return NULL;
	}
	disk->stacked.children.resume = carry_out;
	disk->stacked.children.ended = error_ended;
	disk->stacked.bdev.sparse = base->sparse;
	disk->rules = rules;
	disk->chance = seed | 1;
	disk->retry.fire = retry;
	take_all(&disk->pending);
	take_all(&disk->starved);
	return &disk->stacked.bdev;
}
