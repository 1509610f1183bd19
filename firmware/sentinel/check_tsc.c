/* tsc: the time-stamp counter never goes back between two loop turns of a vCPU. Where: nothing. */
#include "sentinel.h"

static void turn(struct vcpu *v)
{
	if (v->now < v->before)
		violate(v, CHECK_TSC, v->before, v->now, 0);
	count(v, CHECK_TSC);
}

const struct check check_tsc = { .id = CHECK_TSC, .name = "tsc", .flags = EVERY_TURN, .turn = turn };
