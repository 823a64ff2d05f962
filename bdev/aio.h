/*
 * Linux AIO (io_submit(2)) of a reactor: asynchronous for files with O_DIRECT, where io_uring is refused. See
 * bdev/kernel_io.h for what it is to others.
 */
#ifndef BDEV_AIO_H
#define BDEV_AIO_H

#include "bdev/kernel_io.h"

/* cffi: begin */
/* 0, or -errno with which a process like this one cannot have Linux AIO: EAGAIN beyond fs.aio-max-nr. */
int aio_probe(void);
/* cffi: end */

#endif
