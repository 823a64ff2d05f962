/*
 * A file that is locked, by flock(), for as long as anything that a reactor has begun in the kernel can still
 * happen, also after the death of its process: bdev/fence.py waits for that, docs/recovery.md says why. It is
 * made with the first file disk. What may have begun something holds a shared lock by an open file description
 * of its own, which the kernel lets go when it takes that apart.
 */
#ifndef BDEV_FENCE_H
#define BDEV_FENCE_H

#include "reactor/reactor.h"

/* The file of @reactor; the caller has one reference. -errno. */
int fence_get(struct reactor *reactor);
void fence_put(struct reactor *reactor);
/* The same without a reference; -ENODEV when there is none. */
int fence_find(const struct reactor *reactor);

/* A descriptor of @fence that holds a lock until nobody refers to it any more; or -errno. */
int fence_lock(int fence);
/*
 * A page that holds a lock until the address space of this process is taken apart, or the page is unmapped.
 * NULL and errno.
 */
void *fence_map(int fence);
void fence_unmap(void *page);

#endif
