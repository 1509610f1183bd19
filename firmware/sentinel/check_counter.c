/*
 * counter: a counter on each vCPU that never skips or repeats. It is kept three times: as this check's count in the results
 * area, inverted in another page, and as one that is derived by a linear congruential step. Where: which copy.
 */
#include "sentinel.h"

#define FACTOR 6364136223846793005ull /* Knuth's MMIX generator */
#define INCREMENT 1442695040888963407ull

static struct {
	u64 inverted;
	u64 derived, derived_before;
} copies[MAX_CPUS];

static void begin(struct vcpu *v)
{
	copies[v->index].inverted = ~0ull;
	copies[v->index].derived = INCREMENT;
}

static void turn(struct vcpu *v)
{
	u64 *counter = &v->results->counts[CHECK_COUNTER];
	u64 *inverted = &copies[v->index].inverted, *derived = &copies[v->index].derived;
	u64 *derived_before = &copies[v->index].derived_before;

	expect(v, CHECK_COUNTER, *counter, ~*inverted, 1);
	expect(v, CHECK_COUNTER, *derived, *derived_before * FACTOR + INCREMENT, 2);
	*derived_before = *derived;
	*derived = *derived * FACTOR + INCREMENT;
	*inverted = ~++*counter;
	if (!v->index)
		results.ticks = *counter;
}

const struct check check_counter = {
	.id = CHECK_COUNTER,
	.name = "counter",
	.flags = EVERY_TURN,
	.begin = begin,
	.turn = turn,
};
