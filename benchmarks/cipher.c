#include "benchmarks/cipher.h"

#include <endian.h>
#include <openssl/evp.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PAGE 4096
#define KEY_SIZE 64

static EVP_CIPHER_CTX *make_cipher(void)
{
	EVP_CIPHER_CTX *cipher = EVP_CIPHER_CTX_new();
	uint8_t key[KEY_SIZE];

	for (unsigned i = 0; i < KEY_SIZE; i++) {
		key[i] = (uint8_t)i;
	}
	if (cipher && !EVP_CipherInit_ex2(cipher, EVP_aes_256_xts(), key, NULL, 1, NULL)) {
		EVP_CIPHER_CTX_free(cipher);
		return NULL;
	}
	return cipher;
}

static bool encrypt(EVP_CIPHER_CTX *cipher, const uint8_t *from, uint8_t *to, uint32_t unit, uint64_t number)
{
	uint64_t tweak[2] = {htole64(number)};
	int written;

	return EVP_CipherInit_ex2(cipher, NULL, NULL, (const uint8_t *)tweak, -1, NULL) &&
	       EVP_CipherUpdate(cipher, to, &written, from, (int)unit);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* Seconds that it takes, or 0. */
static double run(EVP_CIPHER_CTX *cipher, uint8_t *buffers, uint32_t unit, uint32_t length, uint32_t times)
{
	double begun = now();
	uint64_t number = 0;

	for (uint32_t i = 0; i < times; i++) {
		for (uint32_t at = 0; at + unit <= length; at += unit) {
			if (!encrypt(cipher, buffers + at, buffers + length + at, unit, number++)) {
				return 0;
			}
		}
	}
	return now() - begun;
}

double cipher_speed(uint32_t unit, uint32_t length, uint32_t times)
{
	EVP_CIPHER_CTX *cipher = make_cipher();
	uint8_t *buffers = aligned_alloc(PAGE, 2 * (size_t)length);
	double took = 0;

	if (cipher && buffers) {
		memset(buffers, 0, 2 * (size_t)length);
		took = run(cipher, buffers, unit, length, times);
	}
	free(buffers);
	EVP_CIPHER_CTX_free(cipher);
	return took > 0 ? (double)length * times / took : 0;
}
