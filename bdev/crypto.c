/*
 * Data goes through buffers of our own in both directions. What is written is encrypted there, because a
 * guest's memory must not change under it. What is read is decrypted there, too: in place in the guest's
 * memory, a guest could replace the ciphertext after it was read and have us decrypt what it likes.
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

/* Every block of @data, whose first one is at @offset, in place. 0 or -EIO. */
static int run_cipher(const struct crypto_bdev *disk, EVP_CIPHER_CTX *cipher, uint8_t *data, uint64_t length,
		      uint64_t offset)
{
	const uint32_t block_size = disk->stacked.bdev.block_size;
	uint64_t block = offset / block_size;

	for (uint64_t at = 0; at < length; at += block_size, block++) {
		uint64_t tweak[TWEAK_SIZE / sizeof(uint64_t)] = {htole64(block)};
		int written;

		if (!EVP_CipherInit_ex2(cipher, NULL, NULL, (const uint8_t *)tweak, -1, NULL) ||
		    !EVP_CipherUpdate(cipher, data + at, &written, data + at, (int)block_size)) {
			return -EIO;
		}
	}
	return 0;
}

/* Have the base do @io: with the data that its slot holds, or as it is when it has none. */
static void issue(struct bdev *bdev, struct bdev_io *io)
{
	struct crypto_bdev *disk = (struct crypto_bdev *)bdev;
	const struct bounce_slot *slot = io->scratch[0];
	struct child_io *child;

	if (!slot) {
		stacked_forward(&disk->stacked, io, disk->stacked.bases[0], io->offset);
		return;
	}
	child = children_take(&disk->stacked.children, io);
	if (!child) {
		return; /* we are called again */
	}
	disk->iov[slot->index].iov_len = io->length;
	child->io.bdev = disk->stacked.bases[0];
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

	if (io->op != BDEV_READ && run_cipher(disk, disk->encrypt, slot->buffer, io->length, io->offset)) {
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
		status = run_cipher(disk, disk->decrypt, slot->buffer, io->length, io->offset);
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

	if (memory == MAP_FAILED) {
		return -errno;
	}
	madvise(memory, size, MADV_DONTDUMP); /* plain text */
	disk->memory = memory;
	for (unsigned i = 0; i < BUFFERS; i++) {
		disk->iov[i].iov_base = disk->memory + (size_t)i * BUFFER_SIZE;
	}
	return bounce_init(&disk->bounce, memory, BUFFERS, BUFFER_SIZE, true, start);
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
