/*
 * exception: an exception comes once, after the instruction that raised it. One instruction is executed with RFLAGS.TF, which
 * raises #DB when it is done (a trap, so nothing raises it again if it is lost), and that instruction is an exit to the VMM:
 * whoever stops a vCPU there finds the exception pending. Interrupts are off meanwhile.
 * Where: 0 the number of exceptions, 1 the address that was interrupted, 2 DR6, which the exception changes.
 * Source: AMD64 APM volume 2, 8.2.2 and 13.1.4.
 */
#include "cpu.h"
#include "interrupt.h"
#include "ports.h"
#include "sentinel.h"

#define VECTOR_DEBUG 1
#define RFLAGS_TF 0x100
#define DR6_BS 0x4000u /* the exception is a single step's */

static struct {
	volatile u64 count, rip, dr6; /* as the handler sees them */
	u64 expected;
} traps;

INTERRUPT static void on_debug(struct interrupt_frame *frame)
{
	volatile u64 *rflags = &frame->rflags;

	traps.count++;
	traps.rip = frame->rip;
	traps.dr6 = read_dr6();
	*rflags &= ~(u64)RFLAGS_TF;
}

/* The address after the one instruction that is executed with TF. */
static u64 step(void)
{
	u64 after, value;

	__asm__ volatile("lea 1f(%%rip), %0\n\t"
			 "pushfq\n\t"
			 "orl %3, (%%rsp)\n\t"
			 "popfq\n\t"
			 "inb %w2, %b1\n"
			 "1:\tnop"
			 : "=&r"(after), "=&a"(value)
			 : "d"(COM1 + UART_SCR), "i"(RFLAGS_TF)
			 : "memory", "cc");
	return after;
}

static bool prepare(void)
{
	interrupt_claim(VECTOR_DEBUG, on_debug);
	return true;
}

static void turn(struct vcpu *v)
{
	u64 after, dr6 = read_dr6();

	write_dr6(dr6 & ~(u64)DR6_BS);
	interrupts_off();
	after = step();
	interrupts_on();
	write_dr6(dr6); /* `debug` holds it */
	expect(v, CHECK_EXCEPTION, ++traps.expected, traps.count, 0);
	expect(v, CHECK_EXCEPTION, after, traps.rip, 1);
	expect(v, CHECK_EXCEPTION, DR6_BS, traps.dr6 & DR6_BS, 2);
	count(v, CHECK_EXCEPTION);
}

const struct check check_exception = {
	.id = CHECK_EXCEPTION,
	.name = "exception",
	.flags = FIRST_CPU,
	.prepare = prepare,
	.turn = turn,
};
