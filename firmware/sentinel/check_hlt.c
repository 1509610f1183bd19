/*
 * hlt: a halted vCPU wakes up by an interrupt and by nothing else. Every `halt_every_us`, when the LAPIC timer is due within
 * `halt_us`, the vCPU halts until it comes. Halting is no gap, but waking up late is: the turn's clock goes on from the due
 * time. Where: nothing. Expected, seen: interrupts that this vCPU has had.
 */
#include "boot.h"
#include "cpu.h"
#include "sentinel.h"

static u64 longest, every; /* TSC cycles */
static u64 halted_at[MAX_CPUS];

static bool prepare(void)
{
	longest = microseconds(option_number("halt_us", 2000));
	every = microseconds(option_number("halt_every_us", 50000));
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

	if (v->now - halted_at[v->index] < every)
		return;
	interrupts_off();
	now = rdtsc();
	due = timer_due(v);
	if (due > now && due - now < longest) {
		halted_at[v->index] = now;
		halt(v);
	} else {
		interrupts_on();
	}
}

const struct check check_hlt = { .id = CHECK_HLT, .name = "hlt", .prepare = prepare, .turn = turn };
