/*
 * cpuid: what CPUID says stays the same. Each vCPU compares one leaf in a turn with what it said in the beginning.
 * Where: the leaf. Expected, seen: a mix of the four registers.
 */
#include "cpu.h"
#include "sentinel.h"

static const struct {
	u32 leaf, subleaf;
} table[] = {
	{ 0, 0 },	   { 1, 0 },	      { 4, 0 },	       { 7, 0 },	  { 0xb, 0 },	     { 0xb, 1 },
	{ 0xd, 0 },	   { 0xd, 1 },	      { 0x15, 0 },     { 0x40000000, 0 }, { 0x40000001, 0 }, { 0x40000010, 0 },
	{ 0x80000001, 0 }, { 0x80000002, 0 }, { 0x80000007, 0 }, { 0x80000008, 0 },
};

static struct {
	u8 next;
	u64 expected[ARRAY_SIZE(table)];
} held[MAX_CPUS];

static u64 mixed(u32 i)
{
	struct cpuid r = cpuid(table[i].leaf, table[i].subleaf);

	return ((u64)r.eax << 32 | r.ebx) * 0x9e3779b97f4a7c15ull ^ ((u64)r.ecx << 32 | r.edx);
}

static void begin(struct vcpu *v)
{
	for (u32 i = 0; i < ARRAY_SIZE(table); i++)
		held[v->index].expected[i] = mixed(i);
}

static void turn(struct vcpu *v)
{
	u32 i = held[v->index].next;

	expect(v, CHECK_CPUID, held[v->index].expected[i], mixed(i), table[i].leaf);
	if (++held[v->index].next == ARRAY_SIZE(table))
		held[v->index].next = 0;
	count(v, CHECK_CPUID);
}

const struct check check_cpuid = { .id = CHECK_CPUID, .name = "cpuid", .begin = begin, .turn = turn };
