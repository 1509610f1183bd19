/*
 * posted: writes that may reach the test device late, to a port and to memory, reach it once each, in their order, and before it
 * is asked how many there were. Where: 0 their number, 1 their sum.
 */
#include "cpu.h"
#include "ports.h"
#include "sentinel.h"
#include "testdev.h"

#define WRITES_BETWEEN_LOOKS 5

static u32 posted, sum;

static void post(struct vcpu *v)
{
	u32 value = (u32)unlike(0, posted, v->now);

	if (posted & 1) {
		out16(TESTDEV_POST, (u16)value);
		value = (u16)value;
	} else {
		*(volatile u32 *)(u64)(TESTDEV_PAGE + TESTDEV_POST_REGISTER) = value;
	}
	posted++;
	sum = testdev_sum(sum, value);
}

static void turn(struct vcpu *v)
{
	static u32 step;

	if (step++ < WRITES_BETWEEN_LOOKS) {
		post(v);
	} else {
		expect(v, CHECK_POSTED, posted, testdev_read(TESTDEV_POSTED), 0);
		expect(v, CHECK_POSTED, sum, testdev_read(TESTDEV_POSTED_SUM), 1);
		step = 0;
	}
	count(v, CHECK_POSTED);
}

static bool prepare(void)
{
	if (!testdev_present())
		return false;
	posted = testdev_read(TESTDEV_POSTED);
	sum = testdev_read(TESTDEV_POSTED_SUM);
	return true;
}

const struct check check_posted = { .id = CHECK_POSTED, .name = "posted", .flags = FIRST_CPU, .prepare = prepare, .turn = turn };
