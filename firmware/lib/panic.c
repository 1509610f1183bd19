#include "panic.h"

#include "cpu.h"
#include "format.h"
#include "ports.h"
#include "serial.h"

void debug_exit(u32 code)
{
	out8(DEBUG_EXIT, (u8)code);
	for (;;) {
		interrupts_off();
		__asm__ volatile("hlt");
	}
}

static void say(struct text *t)
{
	text_string(t, "}\r\n");
	for (u32 i = 0; i < t->used; i++)
		serial_put(t->bytes[i]);
}

void panic(u32 code, const char *why)
{
	struct text t = { .used = 0 };

	text_string(&t, "{\"panic\":\"");
	text_string(&t, why);
	text_char(&t, '"');
	say(&t);
	debug_exit(code);
}

void panic_exception(u32 vector, u64 error, u64 rip)
{
	struct text t = { .used = 0 };

	text_string(&t, "{\"panic\":\"exception\",");
	text_field(&t, "vector", vector);
	text_char(&t, ',');
	text_field(&t, "error", error);
	text_char(&t, ',');
	text_field(&t, "rip", rip);
	say(&t);
	debug_exit(PANIC_EXCEPTION);
}
