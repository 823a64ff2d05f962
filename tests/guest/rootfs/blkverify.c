/*
 * Verified load on a block device, from several threads, around the page cache.
 *
 *	blkverify DEVICE OFFSET BLOCKS THREADS CONTROL
 *
 * Each thread owns every THREADSth block of 4 KiB, counted from byte OFFSET. It writes one of its blocks
 * at random, or reads one and compares: a block must hold what was written to it last, for it says which
 * block it is and which generation. CONTROL is a file of two numbers, 8 bytes each, in host order: how many
 * requests have completed, to be watched; and a zero, which whoever wants the load to end makes something
 * else. In the end all blocks that were written are compared once more.
 *
 * Exit status 0: all was as written, and the line "requests N" says how many were done. 1: a line says
 * what was wrong. 2: usage.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BLOCK 4096
#define WORDS (BLOCK / sizeof(uint64_t))
#define MAX_THREADS 64

struct control {
	_Atomic uint64_t done;
	_Atomic uint64_t stop;
};

struct load {
	int fd;
	off_t offset;
	uint64_t blocks;
	unsigned threads;
	struct control *control;
	atomic_bool failed;
};

struct worker {
	struct load *load;
	unsigned index;
	uint32_t *generations; /* of its blocks; 0: not written yet */
	uint64_t *buffer;
	uint64_t random;
	pthread_t thread;
};

/* xorshift64: good enough to choose a block, and the same in every run. */
static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

#define PATTERN_FACTOR 0x9e3779b97f4a7c15
#define PATTERN_INVERSE 0xf1de83e19937733d /* modulo 2^64 */

/* Every word of a block is different, and none is the same in another block or generation. */
static uint64_t pattern(uint64_t block, uint32_t generation, unsigned word)
{
	return (block << 40 | (uint64_t)generation << 10 | word) * PATTERN_FACTOR;
}

static bool fail(struct load *load, const char *what, uint64_t block, uint32_t generation, const char *why)
{
	atomic_store(&load->failed, true);
	printf("%s of block %llu, generation %u: %s\n", what, (unsigned long long)block, generation, why);
	return false;
}

/* Say what a buffer holds in place of what it should, so that it can be told where it comes from. */
static void describe(const uint64_t *buffer, uint64_t block, uint32_t generation, char *out, size_t size)
{
	unsigned wrong = 0, first = 0;

	for (unsigned word = WORDS; word-- > 0;) {
		if (buffer[word] != pattern(block, generation, word)) {
			wrong++;
			first = word;
		}
	}
	uint64_t found = buffer[first] * PATTERN_INVERSE;
	snprintf(out, size,
		 "%u of %zu words are not what was written; word %u is %#llx"
		 " (of block %llu, generation %llu, it would be word %llu); 0xa5 is of before the read",
		 wrong, WORDS, first, (unsigned long long)buffer[first], (unsigned long long)(found >> 40),
		 (unsigned long long)(found >> 10 & 0x3fffffff), (unsigned long long)(found & 0x3ff));
}

static bool write_block(struct worker *worker, uint64_t block, uint32_t generation)
{
	struct load *load = worker->load;

	for (unsigned word = 0; word < WORDS; word++) {
		worker->buffer[word] = pattern(block, generation, word);
	}
	ssize_t rc = pwrite(load->fd, worker->buffer, BLOCK, load->offset + (off_t)(block * BLOCK));
	if (rc != BLOCK) {
		return fail(load, "write", block, generation, rc < 0 ? strerror(errno) : "short");
	}
	return true;
}

static bool check_block(struct worker *worker, uint64_t block, uint32_t generation)
{
	struct load *load = worker->load;

	memset(worker->buffer, 0xa5, BLOCK);
	ssize_t rc = pread(load->fd, worker->buffer, BLOCK, load->offset + (off_t)(block * BLOCK));
	if (rc != BLOCK) {
		return fail(load, "read", block, generation, rc < 0 ? strerror(errno) : "short");
	}
	for (unsigned word = 0; word < WORDS; word++) {
		if (worker->buffer[word] != pattern(block, generation, word)) {
			char why[256];

			describe(worker->buffer, block, generation, why, sizeof(why));
			return fail(load, "read", block, generation, why);
		}
	}
	return true;
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	struct load *load = worker->load;
	uint64_t own = load->blocks / load->threads;
	bool good = true;

	while (good && !atomic_load(&load->failed) && !atomic_load(&load->control->stop)) {
		uint64_t choice = next_random(&worker->random);
		uint64_t mine = (choice >> 8) % own;
		uint64_t block = mine * load->threads + worker->index;

		if (!worker->generations[mine] || (choice & 1)) {
			good = write_block(worker, block, ++worker->generations[mine]);
		} else {
			good = check_block(worker, block, worker->generations[mine]);
		}
		atomic_fetch_add(&load->control->done, 1);
	}
	/* What was written must be there in the end, too. */
	for (uint64_t mine = 0; good && mine < own; mine++) {
		if (worker->generations[mine]) {
			good = check_block(worker, mine * load->threads + worker->index,
					   worker->generations[mine]);
		}
	}
	return NULL;
}

static struct control *open_control(const char *path)
{
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);

	if (fd < 0 || ftruncate(fd, sizeof(struct control)) < 0) {
		return NULL;
	}
	void *map = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	return map == MAP_FAILED ? NULL : map;
}

static int run(struct load *load)
{
	struct worker workers[MAX_THREADS] = {0};

	for (unsigned i = 0; i < load->threads; i++) {
		struct worker *worker = &workers[i];

		worker->load = load;
		worker->index = i;
		worker->random = 0x9e3779b97f4a7c15 + i;
		worker->generations = calloc(load->blocks / load->threads, sizeof(uint32_t));
		worker->buffer = aligned_alloc(BLOCK, BLOCK);
		if (!worker->generations || !worker->buffer ||
		    pthread_create(&worker->thread, NULL, work, worker)) {
			printf("cannot start thread %u\n", i);
			return 1;
		}
	}
	for (unsigned i = 0; i < load->threads; i++) {
		pthread_join(workers[i].thread, NULL);
	}
	printf("requests %llu\n", (unsigned long long)atomic_load(&load->control->done));
	return load->failed ? 1 : 0;
}

int main(int argc, char **argv)
{
	struct load load = {0};

	if (argc != 6) {
		fprintf(stderr, "usage: blkverify DEVICE OFFSET BLOCKS THREADS CONTROL\n");
		return 2;
	}
	load.offset = strtoll(argv[2], NULL, 0);
	load.blocks = strtoull(argv[3], NULL, 0);
	load.threads = (unsigned)strtoul(argv[4], NULL, 0);
	if (load.threads < 1 || load.threads > MAX_THREADS || load.blocks < load.threads) {
		fprintf(stderr, "blkverify: 1 to %d threads, and a block for each\n", MAX_THREADS);
		return 2;
	}
	load.fd = open(argv[1], O_RDWR | O_DIRECT);
	if (load.fd < 0) {
		printf("cannot open %s: %s\n", argv[1], strerror(errno));
		return 1;
	}
	load.control = open_control(argv[5]);
	if (!load.control) {
		printf("cannot create %s: %s\n", argv[5], strerror(errno));
		return 1;
	}
	return run(&load);
}
