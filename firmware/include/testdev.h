/* The test device, as README.md specifies it. Where it is absent, everything reads as all ones. */
#ifndef TESTDEV_H
#define TESTDEV_H

#include "ports.h"
#include "types.h"

#define TESTDEV_PAGE 0xfed10000u
#define TESTDEV_LATCH ((volatile u64 *)TESTDEV_PAGE)
#define TESTDEV_LATCH_WRITES 0x08
#define TESTDEV_STREAM_COUNT 0x10
#define TESTDEV_STREAM_SUM 0x14
#define TESTDEV_STREAM_READS 0x18
#define TESTDEV_ID 0x1c
#define TESTDEV_READS 0x20
#define TESTDEV_POST_REGISTER 0x24
#define TESTDEV_POSTED 0x28
#define TESTDEV_POSTED_SUM 0x2c
#define TESTDEV_MAGIC 0x54534554u /* "TEST" */

static inline u32 testdev_read(u32 reg)
{
	return *(volatile u32 *)(u64)(TESTDEV_PAGE + reg);
}

static inline bool testdev_present(void)
{
	return testdev_read(TESTDEV_ID) == TESTDEV_MAGIC;
}

/* The sum of the stream, or of what was posted, after one more value. */
static inline u32 testdev_sum(u32 sum, u32 value)
{
	return (sum << 1 | sum >> 31) + value;
}

#endif
