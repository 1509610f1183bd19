/*
 * lapic: registers of the local APIC hold what was written to them. Where: the register's offset.
 */
#include "boot.h"
#include "interrupt.h"
#include "sentinel.h"

#define LDR_MASK 0xff000000u

static const u16 table[] = { LAPIC_ID,	LAPIC_VERSION,	 LAPIC_LDR,	  LAPIC_DFR,
			     LAPIC_SVR, LAPIC_LVT_LINT0, LAPIC_LVT_LINT1, LAPIC_LVT_ERROR, LAPIC_TIMER_DIVIDE };

static struct {
	u8 next;
	u64 round;
	u32 expected[ARRAY_SIZE(table)];
} held[MAX_CPUS];

static bool prepare(void)
{
	return boot_info()->flags & BOOT_IRQCHIP;
}

static void write_ldr(struct vcpu *v)
{
	lapic_write(LAPIC_LDR, (u32)unlike(v->index, 0, ++held[v->index].round) & LDR_MASK);
}

static void begin(struct vcpu *v)
{
	write_ldr(v);
	lapic_write(LAPIC_LVT_ERROR, LVT_MASKED | (v->index & 0x3f) | 0x80);
	for (u32 i = 0; i < ARRAY_SIZE(table); i++)
		held[v->index].expected[i] = lapic_read(table[i]);
}

static void turn(struct vcpu *v)
{
	u32 i = held[v->index].next;
	u32 *expected = &held[v->index].expected[i];

	expect(v, CHECK_LAPIC, *expected, lapic_read(table[i]), table[i]);
	if (table[i] == LAPIC_LDR) {
		write_ldr(v);
		*expected = lapic_read(LAPIC_LDR);
	}
	if (++held[v->index].next == ARRAY_SIZE(table))
		held[v->index].next = 0;
	count(v, CHECK_LAPIC);
}

const struct check check_lapic = {
	.id = CHECK_LAPIC,
	.name = "lapic",
	.prepare = prepare,
	.begin = begin,
	.turn = turn,
};
