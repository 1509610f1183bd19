/*
 * debug: DR0 to DR3, DR6 and DR7 hold what was written to them, with breakpoints enabled on addresses that nothing touches.
 * Where: the number of the register.
 */
#include "cpu.h"
#include "sentinel.h"

#define CANONICAL 0x00007ffffffffff8ull
#define DR6_HELD 0xffff4ff3ull /* BS, B1 and B0 over the bits that read as one (active low ones included) */
#define DR7_HELD 0x455ull /* L0 to L3, with the bit that reads as one: break on execution */

static struct {
	u8 next;
	u64 round;
	u64 expected[8];
} held[MAX_CPUS];

static u64 read(u32 number)
{
	switch (number) {
	case 0:
		return read_dr0();
	case 1:
		return read_dr1();
	case 2:
		return read_dr2();
	case 3:
		return read_dr3();
	case 6:
		return read_dr6();
	}
	return read_dr7();
}

static void write(u32 number, u64 value)
{
	switch (number) {
	case 0:
		write_dr0(value);
		break;
	case 1:
		write_dr1(value);
		break;
	case 2:
		write_dr2(value);
		break;
	case 3:
		write_dr3(value);
		break;
	}
}

static void begin(struct vcpu *v)
{
	u64 *expected = held[v->index].expected;

	for (u32 i = 0; i < 4; i++) {
		expected[i] = unlike(v->index, i, 0) & CANONICAL;
		write(i, expected[i]);
	}
	write_dr6(DR6_HELD);
	write_dr7(DR7_HELD);
	expected[6] = read_dr6();
	expected[7] = read_dr7();
}

static void turn(struct vcpu *v)
{
	u32 i = held[v->index].next++ & 7;
	u64 *expected = &held[v->index].expected[i];

	if (i == 4 || i == 5) /* other names of DR6 and DR7 */
		return;
	expect(v, CHECK_DEBUG, *expected, read(i), i);
	if (i < 4) {
		*expected = unlike(v->index, i, ++held[v->index].round) & CANONICAL;
		write(i, *expected);
	}
	count(v, CHECK_DEBUG);
}

const struct check check_debug = { .id = CHECK_DEBUG, .name = "debug", .begin = begin, .turn = turn };
