/*
 * mmio: writes to and reads from the test device, each exactly once. The latch gives what was written plus the number of
 * writes; another register gives the number of its reads so far. Where: the width in bytes, 8 or 4.
 */
#include "sentinel.h"
#include "testdev.h"

static u64 written;
static u32 writes, reads;
static enum { WRITE, READ, READ_COUNT, STEPS } step;

static void turn(struct vcpu *v)
{
	switch (step) {
	case WRITE:
		written = unlike(0, 0, v->now);
		writes++;
		*TESTDEV_LATCH = written;
		break;
	case READ:
		expect(v, CHECK_MMIO, written + writes, *TESTDEV_LATCH, 8);
		break;
	default:
		expect(v, CHECK_MMIO, reads, testdev_read(TESTDEV_READS), 4);
		reads++;
	}
	if (++step == STEPS)
		step = WRITE;
	count(v, CHECK_MMIO);
}

static bool prepare(void)
{
	if (!testdev_present())
		return false;
	writes = testdev_read(TESTDEV_LATCH_WRITES);
	reads = testdev_read(TESTDEV_READS) + 1;
	return true;
}

const struct check check_mmio = { .id = CHECK_MMIO, .name = "mmio", .flags = FIRST_CPU, .prepare = prepare, .turn = turn };
