/* How a guest ends: debug-exit (README.md), and the codes that are no check's. */
#ifndef PANIC_H
#define PANIC_H

#include "types.h"

/* debug-exit codes above every check's number. The process status is (code << 1) | 1. */
#define PANIC_BOOT 100 /* the VMM broke the boot contract */
#define PANIC_EXCEPTION 101 /* an exception that no check asked for */
#define PANIC_SMP 102 /* a vCPU did not start */

/* Ends the guest with `code`; should the port be absent, halts for good. */
__attribute__((noreturn)) void debug_exit(u32 code);
/* Says `why` on COM1 as a JSON line, then ends with `code`. */
__attribute__((noreturn)) void panic(u32 code, const char *why);
/* The same for an exception: where, its vector, its error code. */
__attribute__((noreturn)) void panic_exception(u32 vector, u64 error, u64 rip);

#endif
