/*
 * Keys of encrypted disks. A key stands in a memfd that the control process lends to reactors: it is in no
 * message, and Python never sees it.
 */
#ifndef BDEV_CRYPTO_KEY_H
#define BDEV_CRYPTO_KEY_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
/*
 * Read a key for AES-XTS from @from, both halves as hexadecimal digits with or without an end of line, and
 * store it in the memory file @to. Returns its length in bytes, 32 (AES-128) or 64 (AES-256), or -EBADMSG
 * something that is no hexadecimal digit -EMSGSIZE     another number of digits than 64 or 128 -EKEYREJECTED
 * both halves are the same, with which XTS hides little (IEEE 1619-2018, section 5.1) -errno        of reading
 * or storing it
 */
int crypto_key_read(int from, int to);
/* Overwrite the key in @to. */
void crypto_key_wipe(int to);
/* cffi: end */

#define CRYPTO_KEY_MAX 64

struct crypto_key {
	uint32_t length;
	uint8_t bytes[CRYPTO_KEY_MAX];
};

/* Copy the key in @from; the caller wipes it. 0 or -errno; -EINVAL when there is none. */
int crypto_key_load(int from, struct crypto_key *key);

#endif
