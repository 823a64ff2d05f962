/*
 * Ciphertext is in buffers of our own, in both directions. What is written is encrypted out of the guest's
 * memory into them: a guest that changes it meanwhile has changed what it writes, and no more. What is read is
 * decrypted out of them. Never in place: in its own memory a guest could replace the ciphertext after it was
 * read, and have us decrypt what it likes.
 *
 * The number of the block is the tweak, as a 128-bit little-endian integer. With blocks of 512 bytes that is
 * dm-crypt's aes-xts-plain64.
 */
#include "bdev/crypto.h"

#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <string.h>
#include <sys/mman.h>

#include "bdev/bounce.h"
#include "bdev/crypto_key.h"
#include "bdev/iov.h"
#include "bdev/stacked.h"

#define BUFFERS 64
#define BUFFER_SIZE (128U << 10)
#define TWEAK_SIZE 16

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

struct crypto_bdev {
	struct stacked stacked;
	struct bounce bounce;
	EVP_CIPHER_CTX *encrypt, *decrypt;
	uint8_t *memory;
	struct iovec iov[BUFFERS]; /* of the buffers */
};

/* Where in the buffers of a request we are. */
struct place {
	const struct iovec *iov;
	size_t skip;
};

/* Go on by @size bytes, more than none: where they begin if they are in one buffer, else NULL. */
static uint8_t *take(struct place *place, size_t size)
{
	uint8_t *at = (uint8_t *)place->iov->iov_base + place->skip;
	size_t left = place->iov->iov_len - place->skip;
	bool whole = size <= left;

	for (; size >= left; left = place->iov->iov_len) {
		size -= left;
		place->iov++;
		place->skip = 0;
		if (!size) {
			return whole ? at : NULL;
		}
	}
	place->skip += size;
	return whole ? at : NULL;
}

/* A block, from @from to @to. 0 or -EIO. */
static int run_cipher(EVP_CIPHER_CTX *cipher, const uint8_t *from, uint8_t *to, uint32_t size, uint64_t block)
{
	uint64_t tweak[TWEAK_SIZE / sizeof(uint64_t)] = {htole64(block)};
	int written;

	if (!EVP_CipherInit_ex2(cipher, NULL, NULL, (const uint8_t *)tweak, -1, NULL) ||
	    !EVP_CipherUpdate(cipher, to, &written, from, (int)size)) {
		return -EIO;
	}
	return 0;
}

/* From the caller's memory, or zeroes that are there already, into the buffer of @slot. 0 or -EIO. */
static int encrypt(const struct crypto_bdev *disk, const struct bounce_slot *slot)
{
	const uint32_t size = disk->stacked.bdev.block_size;
	const struct bdev_io *io = slot->io;
	uint64_t block = io->offset / size;
	struct place place = {.iov = io->iov};
	int rc = 0;

	for (uint64_t at = 0; at < io->length && !rc; at += size, block++) {
		uint8_t *buffer = slot->buffer + at, *from = NULL;

		if (io->op == BDEV_WRITE) {
			from = take(&place, size);
			if (!from) {
				iov_copy(io, at, buffer, size);
			}
		}
		rc = run_cipher(disk->encrypt, from ? from : buffer, buffer, size, block);
	}
	return rc;
}

/* From the buffer of @slot, which has been read, into the caller's memory. 0 or -EIO. */
static int decrypt(const struct crypto_bdev *disk, const struct bounce_slot *slot)
{
	const uint32_t size = disk->stacked.bdev.block_size;
	const struct bdev_io *io = slot->io;
	uint64_t block = io->offset / size;
	struct place place = {.iov = io->iov};
	int rc = 0;

	for (uint64_t at = 0; at < io->length && !rc; at += size, block++) {
		uint8_t *buffer = slot->buffer + at, *to = take(&place, size);

		rc = run_cipher(disk->decrypt, buffer, to ? to : buffer, size, block);
		if (!to && !rc) {
			iov_copy(io, at, buffer, size);
		}
	}
	return rc;
}

/* Have the base do @io: with the data that its slot holds, or as it is when it has none. */
static void issue(struct bdev *bdev, struct bdev_io *io)
{
	struct crypto_bdev *disk = (struct crypto_bdev *)bdev;
	const struct bounce_slot *slot = io->scratch[0];
	struct child_io *child;

	if (!slot) {
		stacked_forward(&disk->stacked, io, disk->stacked.base, io->offset);
		return;
	}
	child = children_take(&disk->stacked.children, io);
	if (!child) {
		return; /* we are called again */
	}
	disk->iov[slot->index].iov_len = io->length;
	child->io.bdev = disk->stacked.base;
	child->io.op = io->op == BDEV_READ ? BDEV_READ : BDEV_WRITE;
	child->io.flags = io->op == BDEV_WRITE ? io->flags : 0;
	child->io.iov = &disk->iov[slot->index];
	child->io.iovcnt = 1;
	child->io.offset = io->offset;
	child->io.length = io->length;
	bdev_submit(&child->io);
}

static void start(struct bounce *bounce, struct bounce_slot *slot)
{
	struct crypto_bdev *disk = container_of(bounce, struct crypto_bdev, bounce);
	struct bdev_io *io = slot->io;

	if (io->op != BDEV_READ && encrypt(disk, slot)) {
		bounce_done(bounce, slot, -EIO);
		return;
	}
	io->scratch[0] = slot;
	issue(&disk->stacked.bdev, io);
}

static void crypto_ended(struct bdev *bdev, struct bdev_io *io, int status)
{
	struct crypto_bdev *disk = (struct crypto_bdev *)bdev;
	struct bounce_slot *slot = io->scratch[0];

	if (!slot) {
		bdev_complete(io, status);
		return;
	}
	if (!status && io->op == BDEV_READ) {
		status = decrypt(disk, slot);
	}
	bounce_done(&disk->bounce, slot, status);
}

static void crypto_submit(struct bdev *bdev, struct bdev_io *io)
{
	switch (io->op) {
	case BDEV_RESET:
		bdev_complete_when_quiet(io);
		break;
	case BDEV_READ:
	case BDEV_WRITE:
	case BDEV_WRITE_ZEROES: /* of the plain text */
		bounce_submit(&((struct crypto_bdev *)bdev)->bounce, io);
		break;
	default:
		io->scratch[0] = NULL;
		issue(bdev, io);
	}
}

static int crypto_abort(struct bdev *bdev, struct bdev_io *io)
{
	if (bounce_abort(&((struct crypto_bdev *)bdev)->bounce, io) == 0) {
		return 0;
	}
	return children_abort(&((struct stacked *)bdev)->children, io);
}

static void crypto_remove(struct bdev *bdev)
{
	bounce_fail_waiting(&((struct crypto_bdev *)bdev)->bounce, UINT64_MAX, -ENODEV);
}

static void crypto_close(struct bdev *bdev)
{
	struct crypto_bdev *disk = (struct crypto_bdev *)bdev;

	EVP_CIPHER_CTX_free(disk->encrypt); /* these wipe the key */
	EVP_CIPHER_CTX_free(disk->decrypt);
	bounce_free(&disk->bounce);
	if (disk->memory) {
		munmap(disk->memory, (size_t)BUFFERS * BUFFER_SIZE);
	}
	stacked_close(bdev);
}

static const struct bdev_ops crypto_ops = {
    .submit = crypto_submit,
    .remove = crypto_remove,
    .abort = crypto_abort,
    .close = crypto_close,
};

static EVP_CIPHER_CTX *make_cipher(const struct crypto_key *key, int encrypt)
{
	const EVP_CIPHER *kind = key->length == CRYPTO_KEY_MAX ? EVP_aes_256_xts() : EVP_aes_128_xts();
	EVP_CIPHER_CTX *cipher = EVP_CIPHER_CTX_new();

	if (cipher && !EVP_CipherInit_ex2(cipher, kind, key->bytes, NULL, encrypt, NULL)) {
		EVP_CIPHER_CTX_free(cipher);
		return NULL;
	}
	return cipher;
}

static int make_ciphers(struct crypto_bdev *disk, int key_fd)
{
	struct crypto_key key;
	int rc = crypto_key_load(key_fd, &key);

	if (!rc) {
		disk->encrypt = make_cipher(&key, 1);
		disk->decrypt = make_cipher(&key, 0);
		rc = disk->encrypt && disk->decrypt ? 0 : -ENOMEM;
	}
	OPENSSL_cleanse(&key, sizeof(key));
	return rc;
}

static int make_buffers(struct crypto_bdev *disk)
{
	const size_t size = (size_t)BUFFERS * BUFFER_SIZE;
	/* Takes address space; memory only once it is used. */
	void *memory =
	    mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	int rc;

	if (memory == MAP_FAILED) {
		return -errno;
	}
	madvise(memory, size, MADV_DONTDUMP); /* plain text */
	disk->memory = memory;
	for (unsigned i = 0; i < BUFFERS; i++) {
		disk->iov[i].iov_base = disk->memory + (size_t)i * BUFFER_SIZE;
	}
	rc = bounce_init(&disk->bounce, memory, BUFFERS, BUFFER_SIZE, true, start);
	disk->bounce.untouched = true;
	return rc;
}

struct bdev *crypto_bdev_open(uint64_t id, uint32_t slot, uint64_t block_count, struct bdev *base, int key_fd)
{
	struct crypto_bdev *disk = stacked_over(sizeof(*disk), base, &crypto_ops, id, slot, block_count);
	int rc;

	if (!disk) {
		return NULL;
	}
	disk->stacked.children.resume = issue;
	disk->stacked.children.ended = crypto_ended;
	rc = make_ciphers(disk, key_fd);
	if (!rc) {
		rc = make_buffers(disk);
	}
	if (!rc) {
		rc = bounce_limit(&disk->bounce, &disk->stacked.bdev, (struct bdev_limits){0});
	}
	if (rc) {
		crypto_close(&disk->stacked.bdev);
		errno = -rc;
		return NULL;
	}
	return &disk->stacked.bdev;
}
