/*
 * xmm: XMM0 to XMM15 hold what was loaded; one is verified and reloaded in a turn. Where: the register's number, plus 16 for its
 * upper half.
 */
#include "cpu.h"
#include "sentinel.h"
#include "vectors.h"

#define CPUID1_EDX_SSE2 (1u << 26)

struct vector {
	u64 half[2];
} __attribute__((aligned(16)));

static struct vector loaded[MAX_CPUS][16];
static u8 next[MAX_CPUS];
static u64 rounds[MAX_CPUS];

#define LOAD_CASE(n)                                                     \
	case n:                                                          \
		__asm__ volatile("movdqu %0, %%xmm" #n : : "m"(*value)); \
		break;
#define STORE_CASE(n)                                                     \
	case n:                                                           \
		__asm__ volatile("movdqu %%xmm" #n ", %0" : "=m"(*value)); \
		break;

static void load(u32 number, const struct vector *value)
{
	switch (number) {
		EACH_REGISTER(LOAD_CASE)
	}
}

static void store(u32 number, struct vector *value)
{
	switch (number) {
		EACH_REGISTER(STORE_CASE)
	}
}

static void reload(struct vcpu *v, u32 number)
{
	struct vector *value = &loaded[v->index][number];

	value->half[0] = unlike(v->index, number, ++rounds[v->index]);
	value->half[1] = ~value->half[0];
	load(number, value);
}

static bool prepare(void)
{
	return cpuid(1, 0).edx & CPUID1_EDX_SSE2;
}

static void begin(struct vcpu *v)
{
	write_cr4(read_cr4() | CR4_OSFXSR);
	for (u32 i = 0; i < 16; i++)
		reload(v, i);
}

static void turn(struct vcpu *v)
{
	u32 number = next[v->index]++ % 16;
	struct vector seen;

	store(number, &seen);
	expect(v, CHECK_XMM, loaded[v->index][number].half[0], seen.half[0], number);
	expect(v, CHECK_XMM, loaded[v->index][number].half[1], seen.half[1], number + 16);
	reload(v, number);
	count(v, CHECK_XMM);
}

const struct check check_xmm = { .id = CHECK_XMM, .name = "xmm", .prepare = prepare, .begin = begin, .turn = turn };
