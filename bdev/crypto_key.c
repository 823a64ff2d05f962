#include "bdev/crypto_key.h"

#include <ctype.h>
#include <errno.h>
#include <openssl/crypto.h>
#include <sys/mman.h>
#include <unistd.h>

#define DIGITS_MAX (2 * CRYPTO_KEY_MAX)
#define ROOM (DIGITS_MAX + 16) /* and an end of line, however long; one byte more is too much */

static int digit_of(char character)
{
	if (character >= '0' && character <= '9') {
		return character - '0';
	}
	character = (char)(character | 0x20);
	return character >= 'a' && character <= 'f' ? character - 'a' + 10 : -1;
}

/* Read until the end of the file, or of @room. Returns how many bytes, or -errno. */
static ssize_t read_all(int fd, char *text, size_t room)
{
	size_t count = 0;

	while (count < room) {
		ssize_t here = read(fd, text + count, room - count);

		if (here < 0 && errno == EINTR) {
			continue;
		}
		if (here < 0) {
			return -errno;
		}
		if (here == 0) {
			break;
		}
		count += (size_t)here;
	}
	return (ssize_t)count;
}

static int parse(const char *text, size_t count, struct crypto_key *key)
{
	while (count && isspace((unsigned char)text[count - 1])) {
		count--;
	}
	for (size_t i = 0; i < count; i++) {
		if (digit_of(text[i]) < 0) {
			return -EBADMSG;
		}
	}
	if (count != DIGITS_MAX && count != DIGITS_MAX / 2) {
		return -EMSGSIZE;
	}
	key->length = (uint32_t)count / 2;
	for (size_t i = 0; i < key->length; i++) {
		key->bytes[i] = (uint8_t)(digit_of(text[2 * i]) << 4 | digit_of(text[2 * i + 1]));
	}
	if (CRYPTO_memcmp(key->bytes, key->bytes + key->length / 2, key->length / 2) == 0) {
		return -EKEYREJECTED;
	}
	return 0;
}

static struct crypto_key *map(int fd)
{
	void *key = mmap(NULL, sizeof(struct crypto_key), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (key == MAP_FAILED) {
		return NULL;
	}
	madvise(key, sizeof(struct crypto_key), MADV_DONTDUMP);
	return key;
}

int crypto_key_read(int from, int to)
{
	char text[ROOM];
	struct crypto_key *key;
	ssize_t count = read_all(from, text, sizeof(text));
	int rc = (int)count;

	if (count >= 0) {
		rc = ftruncate(to, sizeof(*key)) ? -errno : 0;
	}
	if (rc == 0) {
		key = map(to);
		rc = key ? parse(text, (size_t)count, key) : -errno;
		if (key) {
			rc = rc ? rc : (int)key->length;
			if (rc < 0) {
				OPENSSL_cleanse(key, sizeof(*key));
			}
			munmap(key, sizeof(*key));
		}
	}
	OPENSSL_cleanse(text, sizeof(text));
	return rc;
}

void crypto_key_wipe(int to)
{
	struct crypto_key *key = map(to);

	if (key) {
		OPENSSL_cleanse(key, sizeof(*key));
		munmap(key, sizeof(*key));
	}
}

int crypto_key_load(int from, struct crypto_key *key)
{
	struct crypto_key *shared = map(from);

	if (!shared) {
		return -errno;
	}
	*key = *shared;
	munmap(shared, sizeof(*shared));
	return key->length == CRYPTO_KEY_MAX || key->length == CRYPTO_KEY_MAX / 2 ? 0 : -EINVAL;
}
