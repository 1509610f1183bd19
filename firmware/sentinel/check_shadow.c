/*
 * shadow: an interrupt that waits for STI comes once, and not before the instruction after STI is done: that one is in STI's
 * shadow. It is an exit to the VMM: whoever stops a vCPU there finds it about to take the interrupt.
 * Where: 0 the number of interrupts, 1 the address that was interrupted.
 * Source: AMD64 APM volume 2, 8.1.5 and 15.21.5.
 */
#include "boot.h"
#include "cpu.h"
#include "interrupt.h"
#include "ports.h"
#include "sentinel.h"

#define POLLS 1000
#define WORD (VECTOR_SHADOW / 32)
#define BIT (1u << VECTOR_SHADOW % 32)

static struct {
	volatile u64 count, rip; /* as the handler sees them */
	u64 expected, sent_at;
	u32 looks;
} interrupts;

INTERRUPT static void on_interrupt(struct interrupt_frame *frame)
{
	this_vcpu()->interrupts++;
	interrupts.count++;
	interrupts.rip = frame->rip;
	lapic_eoi();
}

static bool prepare(void)
{
	interrupt_claim(VECTOR_SHADOW, on_interrupt);
	return boot_info()->flags & BOOT_IRQCHIP;
}

/* Lets it in. The address of the one instruction that is executed in the shadow. */
static u64 let_in(void)
{
	u64 shadowed, value;

	__asm__ volatile("lea 1f(%%rip), %0\n\t"
			 "sti\n"
			 "1:\tinb %w2, %b1"
			 : "=&r"(shadowed), "=&a"(value)
			 : "d"(COM1 + UART_SCR)
			 : "memory");
	return shadowed;
}

static void send(struct vcpu *v)
{
	u64 nmis, shadowed;

	interrupts_off();
	lapic_write(LAPIC_ICR_LOW, ICR_SELF | VECTOR_SHADOW);
	for (u32 polls = POLLS; polls && !(lapic_read(LAPIC_IRR + 0x10 * WORD) & BIT); polls--)
		pause();
	interrupts.expected++;
	interrupts.sent_at = v->now;
	interrupts.looks = 0;
	interrupts.rip = 0;
	nmis = nmi_count();
	shadowed = let_in();
	if (interrupts.rip == shadowed && nmis == nmi_count()) /* returning from an NMI ends the shadow */
		violate(v, CHECK_SHADOW, shadowed + 1, shadowed, 1);
	count(v, CHECK_SHADOW);
}

/* It may come later than in the turn that sent it: where others wait too, not every KVM that emulates its guests is exact. */
static void turn(struct vcpu *v)
{
	u64 came = interrupts.count;

	if (came == interrupts.expected)
		send(v);
	else if (came > interrupts.expected || (++interrupts.looks > STALL_LOOKS && v->now - interrupts.sent_at > stall_cycles))
		violate(v, CHECK_SHADOW, interrupts.expected, came, 0);
}

const struct check check_shadow = {
	.id = CHECK_SHADOW,
	.name = "shadow",
	.flags = FIRST_CPU,
	.prepare = prepare,
	.turn = turn,
};
