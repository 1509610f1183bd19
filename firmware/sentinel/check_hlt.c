/*
 * hlt: a halted vCPU wakes up by an interrupt and by nothing else. Now and then, when the LAPIC timer is due within two
 * milliseconds, the vCPU halts until it comes. Halting is no gap, but waking up late is: the turn's clock goes on from the due
 * time. Where: nothing. Expected, seen: interrupts that this vCPU has had.
 */
#include "cpu.h"
#include "sentinel.h"

#define LONGEST_US 2000
#define BETWEEN_US 50000

static u64 halted_at[MAX_CPUS];

static bool prepare(void)
{
	return results.checks[CHECK_TIMER].state == CHECK_ON;
}

static void halt(struct vcpu *v)
{
	u64 before = v->interrupts, due, now;

	due = timer_due(v);
	interrupts_on_and_halt();
	now = rdtsc();
	v->results->last_tsc = now < due ? now : due;
	if (v->interrupts == before)
		violate(v, CHECK_HLT, before + 1, before, 0);
	count(v, CHECK_HLT);
}

static void turn(struct vcpu *v)
{
	u64 due, now;

	if (v->now - halted_at[v->index] < microseconds(BETWEEN_US))
		return;
	interrupts_off();
	now = rdtsc();
	due = timer_due(v);
	if (due > now && due - now < microseconds(LONGEST_US)) {
		halted_at[v->index] = now;
		halt(v);
	} else {
		interrupts_on();
	}
}

const struct check check_hlt = { .id = CHECK_HLT, .name = "hlt", .prepare = prepare, .turn = turn };
