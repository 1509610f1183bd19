/*
 * cpus: every vCPU that was started goes on taking turns. The first vCPU looks at one of the others in a turn.
 * Where: the APIC ID. Expected, seen: its turns.
 */
#include "sentinel.h"

static struct {
	u64 turns, since;
	u32 looks;
} seen[MAX_CPUS];
static u32 next;

static void turn(struct vcpu *v)
{
	u64 turns;

	if (++next >= cpu_count)
		next = 0;
	turns = results.cpu[next].turns;
	if (turns != seen[next].turns) {
		seen[next].turns = turns;
		seen[next].since = v->now;
		seen[next].looks = 0;
	} else if (++seen[next].looks > STALL_LOOKS && v->now - seen[next].since > stall_cycles) {
		violate(v, CHECK_CPUS, turns + 1, turns, next);
	}
	count(v, CHECK_CPUS);
}

const struct check check_cpus = { .id = CHECK_CPUS, .name = "cpus", .flags = FIRST_CPU, .turn = turn };
