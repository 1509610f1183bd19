/*
 * mmio: writes to and reads from the test device's latch, each exactly once: a read gives what was written plus the number of
 * writes. Where: the width in bytes.
 */
#include "sentinel.h"
#include "testdev.h"

static u64 written;
static u32 writes;
static bool reads;

static void turn(struct vcpu *v)
{
	if (reads) {
		expect(v, CHECK_MMIO, written + writes, *TESTDEV_LATCH, 8);
	} else {
		written = unlike(0, 0, v->now);
		writes++;
		*TESTDEV_LATCH = written;
	}
	reads = !reads;
	count(v, CHECK_MMIO);
}

static bool prepare(void)
{
	if (!testdev_present())
		return false;
	writes = testdev_read(TESTDEV_LATCH_WRITES);
	return true;
}

const struct check check_mmio = { .id = CHECK_MMIO, .name = "mmio", .flags = FIRST_CPU, .prepare = prepare, .turn = turn };
