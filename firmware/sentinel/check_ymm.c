/*
 * ymm: the upper halves of YMM0 to YMM15, and XCR0, hold what was loaded. AVX and XSAVE are beyond KVM's emulator: only with
 * fpu=1. Where: the register's number, plus 16 for the upper quarter; 32 for XCR0.
 */
#include "cpu.h"
#include "sentinel.h"
#include "vectors.h"

#define CPUID1_ECX_XSAVE_AND_AVX (1u << 26 | 1u << 28)
#define XCR0_X87_SSE_AVX 7

struct upper {
	u64 quarter[2];
} __attribute__((aligned(16)));

static struct upper loaded[MAX_CPUS][16];
static u8 next[MAX_CPUS];
static u64 rounds[MAX_CPUS];

#define LOAD_CASE(n)                                                                              \
	case n:                                                                                   \
		__asm__ volatile("vinsertf128 $1, %0, %%ymm" #n ", %%ymm" #n : : "m"(*value)); \
		break;
#define STORE_CASE(n)                                                                  \
	case n:                                                                        \
		__asm__ volatile("vextractf128 $1, %%ymm" #n ", %0" : "=m"(*value)); \
		break;

static void load(u32 number, const struct upper *value)
{
	switch (number) {
		EACH_REGISTER(LOAD_CASE)
	}
}

static void store(u32 number, struct upper *value)
{
	switch (number) {
		EACH_REGISTER(STORE_CASE)
	}
}

static void reload(struct vcpu *v, u32 number)
{
	struct upper *value = &loaded[v->index][number];

	value->quarter[0] = unlike(v->index, number + 32, ++rounds[v->index]);
	value->quarter[1] = ~value->quarter[0];
	load(number, value);
}

static u32 read_xcr0(void)
{
	u32 low, high;

	__asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
	return low;
}

static bool prepare(void)
{
	return (cpuid(1, 0).ecx & CPUID1_ECX_XSAVE_AND_AVX) == CPUID1_ECX_XSAVE_AND_AVX;
}

static void begin(struct vcpu *v)
{
	write_cr4(read_cr4() | CR4_OSFXSR | CR4_OSXSAVE);
	__asm__ volatile("xsetbv" : : "a"(XCR0_X87_SSE_AVX), "d"(0), "c"(0));
	for (u32 i = 0; i < 16; i++)
		reload(v, i);
}

static void turn(struct vcpu *v)
{
	u32 number = next[v->index]++ % 16;
	struct upper seen;

	store(number, &seen);
	expect(v, CHECK_YMM, loaded[v->index][number].quarter[0], seen.quarter[0], number);
	expect(v, CHECK_YMM, loaded[v->index][number].quarter[1], seen.quarter[1], number + 16);
	if (!number)
		expect(v, CHECK_YMM, XCR0_X87_SSE_AVX, read_xcr0(), 32);
	reload(v, number);
	count(v, CHECK_YMM);
}

const struct check check_ymm = {
	.id = CHECK_YMM,
	.name = "ymm",
	.flags = FPU,
	.prepare = prepare,
	.begin = begin,
	.turn = turn,
};
