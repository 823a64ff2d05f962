/* Runs a fuzz target on files, without a fuzzer: for the corpus, and for inputs that were found. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MAX_INPUT (1 << 20)

int main(int argc, char **argv)
{
	uint8_t *data = malloc(MAX_INPUT);

	for (int i = 1; data != NULL && i < argc; i++) {
		FILE *file = fopen(argv[i], "rb");
		size_t size;

		if (file == NULL) {
			perror(argv[i]);
			return 1;
		}
		size = fread(data, 1, MAX_INPUT, file);
		fclose(file);
		fprintf(stderr, "%s: %zu bytes\n", argv[i], size);
		LLVMFuzzerTestOneInput(data, size);
	}
	free(data);
	return 0;
}
