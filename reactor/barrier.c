#include "reactor/barrier.h"

#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>

static void membarrier(int command)
{
	(void)syscall(SYS_membarrier, command, 0, 0);
}

void barrier_register(void)
{
	membarrier(MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED);
}

void barrier_everywhere(void)
{
	membarrier(MEMBARRIER_CMD_GLOBAL_EXPEDITED);
}
