/*
 * counter: a counter on each vCPU that never skips or repeats. It is kept in three forms: as this check's count in the
 * results area, inverted, and as its multiple. Where: which form disagrees.
 */
#include "sentinel.h"

#define FACTOR 6364136223846793005ull /* odd, so that no two counts have the same multiple */

static struct {
	u64 inverted, multiple;
} forms[MAX_CPUS];

static void begin(struct vcpu *v)
{
	forms[v->index].inverted = ~0ull;
}

static void turn(struct vcpu *v)
{
	u64 *counter = &v->results->counts[CHECK_COUNTER], *inverted = &forms[v->index].inverted;
	u64 *multiple = &forms[v->index].multiple, value = *counter;

	expect(v, CHECK_COUNTER, value, ~*inverted, 1);
	expect(v, CHECK_COUNTER, value * FACTOR, *multiple, 2);
	*counter = ++value;
	*inverted = ~value;
	*multiple += FACTOR;
	if (!v->index)
		results.ticks = value;
}

const struct check check_counter = {
	.id = CHECK_COUNTER,
	.name = "counter",
	.flags = EVERY_TURN,
	.begin = begin,
	.turn = turn,
};
