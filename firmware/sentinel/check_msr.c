/*
 * msr: model-specific registers hold what was written to them, on each vCPU something else. One is verified and rewritten in a
 * turn; those that cannot be changed at will must stay as they were found. Where: the MSR. Value: how many this machine has.
 * mtrr: the same for the memory type range registers. These, the machine check banks and OSVW are what KVM keeps and does not
 * name in KVM_GET_MSR_INDEX_LIST.
 */
#include "cpu.h"
#include "interrupt.h"
#include "sentinel.h"

#define CANONICAL 0x00007fffffffffffull /* the lower half of the address space, whatever its size */
#define LOW 0xffffffffull
#define TYPES 0x0404040404040404ull /* in each byte memory type 0 or 4: UC, WT */
#define PAT_ENTRY0 0xffull /* the one that the page tables here use */
#define MOST 24

struct place {
	u32 msr;
	u64 writable; /* bits that may take any value; 0: only looked at */
};

struct group {
	enum check_id id;
	const struct place *places;
	u32 size;
	bool has[MOST], writable[MOST];
	struct {
		u32 next;
		u64 round;
		u64 expected[MOST];
	} held[MAX_CPUS];
};

/* Sources: AMD64 APM volume 2 appendix A; Linux Documentation/virt/kvm/x86/msr.rst. */
static const struct place msrs[] = {
	{ 0xc0000081, ~0ull }, /* STAR */
	{ 0xc0000082, CANONICAL }, /* LSTAR */
	{ 0xc0000083, CANONICAL }, /* CSTAR */
	{ 0xc0000084, LOW }, /* SFMASK */
	{ 0xc0000100, CANONICAL }, /* FS.base */
	{ 0xc0000102, CANONICAL }, /* KernelGSbase */
	{ 0xc0000103, LOW }, /* TSC_AUX */
	{ 0x174, 0xffff }, /* SYSENTER_CS */
	{ 0x175, LOW }, /* SYSENTER_ESP: AMD has no more of it, nor restores more */
	{ 0x176, LOW }, /* SYSENTER_EIP: likewise */
	{ 0x277, TYPES & ~PAT_ENTRY0 }, /* PAT */
	{ 0x402, ~0ull }, /* MC0_ADDR */
	{ 0xc0010140, 0xffff }, /* OSVW_ID_Length */
	{ MSR_APIC_BASE, 0 },
	{ MSR_EFER, 0 },
	{ MSR_GS_BASE, 0 },
	{ 0x3b, 0 }, /* TSC_ADJUST */
	{ 0x1a0, 0 }, /* MISC_ENABLE */
	{ 0x48, 0 }, /* SPEC_CTRL */
	{ 0xda0, 0 }, /* XSS */
	{ 0x4b564d01, 0 }, /* KVM's system time */
};
static const struct place mtrrs[] = {
	{ 0x250, TYPES }, /* fixed ranges, from 64 KiB to 4 KiB */
	{ 0x258, TYPES },
	{ 0x259, TYPES },
	{ 0x268, TYPES },
	{ 0x26f, TYPES },
	{ 0x200, 0xfffff004 }, /* base and mask of the first variable range, which its mask leaves disabled */
	{ 0x201, 0xfffff000 },
	{ 0x2ff, 0x4 }, /* default type: MTRRs disabled */
};

static struct group msr_group = { .id = CHECK_MSR, .places = msrs, .size = ARRAY_SIZE(msrs) };
static struct group mtrr_group = { .id = CHECK_MTRR, .places = mtrrs, .size = ARRAY_SIZE(mtrrs) };
_Static_assert(ARRAY_SIZE(msrs) <= MOST && ARRAY_SIZE(mtrrs) <= MOST, "a group holds up to MOST");

static u64 fresh(const struct group *g, u32 cpu, u32 i)
{
	return unlike(cpu, i, g->held[cpu].round) & g->places[i].writable;
}

static bool takes(const struct group *g, u32 i)
{
	u32 msr = g->places[i].msr;
	u64 value = fresh(g, 0, i), now;

	return g->places[i].writable && msr_try(msr, value) && msr_probe(msr, &now) && now == value;
}

static bool prepare(struct group *g)
{
	for (u32 i = 0; i < g->size; i++) {
		u64 found;

		g->has[i] = msr_probe(g->places[i].msr, &found);
		if (!g->has[i])
			continue;
		results.checks[g->id].value++;
		g->writable[i] = takes(g, i);
		if (g->places[i].writable)
			msr_try(g->places[i].msr, found);
	}
	return results.checks[g->id].value;
}

static void begin(struct group *g, u32 cpu)
{
	for (u32 i = 0; i < g->size; i++) {
		if (g->writable[i])
			wrmsr(g->places[i].msr, fresh(g, cpu, i));
		if (g->has[i])
			g->held[cpu].expected[i] = rdmsr(g->places[i].msr);
	}
}

static void turn(struct group *g, struct vcpu *v)
{
	u32 i = g->held[v->index].next, msr = g->places[i].msr;
	u64 *expected = &g->held[v->index].expected[i];

	if (g->has[i]) {
		expect(v, g->id, *expected, rdmsr(msr), msr);
		if (g->writable[i]) {
			*expected = fresh(g, v->index, i);
			wrmsr(msr, *expected);
		}
		count(v, g->id);
	}
	if (++g->held[v->index].next == g->size) {
		g->held[v->index].next = 0;
		g->held[v->index].round++;
	}
}

#define CHECK(name)                                   \
	static bool prepare_##name(void)              \
	{                                             \
		return prepare(&name##_group);        \
	}                                             \
	static void begin_##name(struct vcpu *v)      \
	{                                             \
		begin(&name##_group, v->index);       \
	}                                             \
	static void turn_##name(struct vcpu *v)       \
	{                                             \
		turn(&name##_group, v);               \
	}

CHECK(msr)
CHECK(mtrr)

const struct check check_msr = {
	.id = CHECK_MSR,
	.name = "msr",
	.prepare = prepare_msr,
	.begin = begin_msr,
	.turn = turn_msr,
};
const struct check check_mtrr = {
	.id = CHECK_MTRR,
	.name = "mtrr",
	.prepare = prepare_mtrr,
	.begin = begin_mtrr,
	.turn = turn_mtrr,
};
