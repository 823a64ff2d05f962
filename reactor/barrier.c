#include "reactor/barrier.h"

#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>

bool barrier_is_dear;

static bool membarrier(int command)
{
	return syscall(SYS_membarrier, command, 0, 0) == 0;
}

void barrier_register(void)
{
	barrier_is_dear = !membarrier(MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED);
}

void barrier_everywhere(void)
{
	if (!membarrier(MEMBARRIER_CMD_GLOBAL_EXPEDITED)) {
		__atomic_thread_fence(__ATOMIC_SEQ_CST); /* the others have theirs */
	}
}
