/* A yardstick for encryption: what OpenSSL does when each data unit has a tweak of its own, as on any disk. */
#ifndef BENCHMARKS_CIPHER_H
#define BENCHMARKS_CIPHER_H

#include <stdint.h>

/* cffi: begin */
/*
 * Encrypt a buffer of @length bytes into another one by AES-256-XTS, in units of @unit bytes numbered from 0
 * on,
 * @times over. Returns bytes a second; 0 if OpenSSL fails or memory is short.
 */
double cipher_speed(uint32_t unit, uint32_t length, uint32_t times);
/* cffi: end */

#endif
