/*
 * registers: general-purpose registers and the carry flag keep their values while nothing but a count-down executes.
 * Where: nothing. Seen: a bit for each register that changed, in the order of registers.S.
 */
#include "sentinel.h"

#define LOOPS 8

u64 registers_hold(u64 seed, u64 loops);

static void turn(struct vcpu *v)
{
	expect(v, CHECK_REGISTERS, 0, registers_hold(unlike(v->index, 0, v->now), LOOPS), 0);
	count(v, CHECK_REGISTERS);
}

const struct check check_registers = { .id = CHECK_REGISTERS, .name = "registers", .turn = turn };
