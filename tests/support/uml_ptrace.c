/* For user-mode Linux on a processor whose register state is larger than it knows (AMX).

   UML keeps 2696 bytes of each process's extended state, in the standard format, which ends before
   what AMX adds.  The host lets a part be read, but takes only the whole when it is written.  Loaded
   before libc, this writes back the whole: what UML knows over what the process has.  */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

typedef long (*ptrace_t)(int, pid_t, void *, void *);

long ptrace(enum __ptrace_request request, ...)
{
	static ptrace_t real;
	static char state[1 << 14] __attribute__((aligned(64)));  /* stacks of a kernel are small */
	struct iovec whole = {state, sizeof state};
	struct iovec *known;
	va_list arguments;

	va_start(arguments, request);
	pid_t pid = va_arg(arguments, pid_t);
	void *address = va_arg(arguments, void *);
	void *data = va_arg(arguments, void *);
	va_end(arguments);
	if (!real)
		real = (ptrace_t)dlsym(RTLD_NEXT, "ptrace");
	if (request != PTRACE_SETREGSET || address != (void *)NT_X86_XSTATE)
		return real(request, pid, address, data);
	if (real(PTRACE_GETREGSET, pid, address, &whole) < 0)
		return -1;
	known = data;
	memcpy(state, known->iov_base, known->iov_len);
	return real(PTRACE_SETREGSET, pid, address, &whole);
}
