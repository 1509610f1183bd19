/*
 * tscsync: no vCPU's TSC is behind another's. Each compares its own with what its neighbour sampled before.
 * Where: the neighbour's APIC ID. Expected: at most this vCPU's TSC, plus what reordered reads may make up.
 */
#include "cpu.h"
#include "sentinel.h"

#define SLACK_US 1 /* RDTSC may execute before a load that comes first, and no fence holds it here */

static u64 slack;

static bool prepare(void)
{
	slack = microseconds(SLACK_US);
	return true;
}

static void turn(struct vcpu *v)
{
	struct vcpu *other = neighbour(v);
	u64 sampled = *(volatile u64 *)&other->results->last_tsc, now = rdtsc();

	if (sampled > now + slack)
		violate(v, CHECK_TSCSYNC, now + slack, sampled, other->index);
	count(v, CHECK_TSCSYNC);
}

const struct check check_tscsync = { .id = CHECK_TSCSYNC, .name = "tscsync", .prepare = prepare, .turn = turn };
