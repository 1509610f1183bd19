/*
 * msr: model-specific registers hold what was written to them, on each vCPU something else. One is verified and rewritten in a
 * turn; those that cannot be changed at will must stay as they were found. Where: the MSR. Value: how many this machine has.
 */
#include "cpu.h"
#include "interrupt.h"
#include "sentinel.h"

#define CANONICAL 0x00007fffffffffffull /* the lower half of the address space, whatever its size */
#define LOW 0xffffffffull
#define PAT_TYPES 0x0404040404040404ull /* memory types 0 and 4 (UC, WT) in the entries that no page table here uses */
#define PAT_ENTRY0 0xffull

/* Sources: AMD64 APM volume 2 appendix A; Linux Documentation/virt/kvm/x86/msr.rst. */
static const struct {
	u32 msr;
	u64 writable; /* bits that may take any value; 0: only looked at */
} table[] = {
	{ 0xc0000081, ~0ull },			 /* STAR */
	{ 0xc0000082, CANONICAL },		 /* LSTAR */
	{ 0xc0000083, CANONICAL },		 /* CSTAR */
	{ 0xc0000084, LOW },			 /* SFMASK */
	{ 0xc0000100, CANONICAL },		 /* FS.base */
	{ 0xc0000102, CANONICAL },		 /* KernelGSbase */
	{ 0xc0000103, LOW },			 /* TSC_AUX */
	{ 0x174, 0xffff },			 /* SYSENTER_CS */
	{ 0x175, CANONICAL },			 /* SYSENTER_ESP */
	{ 0x176, CANONICAL },			 /* SYSENTER_EIP */
	{ 0x277, PAT_TYPES & ~PAT_ENTRY0 },	 /* PAT */
	{ 0x250, PAT_TYPES },			 /* MTRRfix64K_00000 */
	{ MSR_APIC_BASE, 0 },
	{ MSR_EFER, 0 },
	{ MSR_GS_BASE, 0 },
	{ 0x3b, 0 },				 /* TSC_ADJUST */
	{ 0x1a0, 0 },				 /* MISC_ENABLE */
	{ 0x2ff, 0 },				 /* MTRRdefType */
	{ 0x48, 0 },				 /* SPEC_CTRL */
	{ 0xda0, 0 },				 /* XSS */
	{ 0x4b564d01, 0 },			 /* KVM system time */
};

static struct {
	u8 next;
	u64 round;
	u64 expected[ARRAY_SIZE(table)];
} held[MAX_CPUS];
static bool has[ARRAY_SIZE(table)], writable[ARRAY_SIZE(table)];

static u64 fresh(u32 cpu, u32 i)
{
	return unlike(cpu, i, held[cpu].round) & table[i].writable;
}

static bool prepare(void)
{
	for (u32 i = 0; i < ARRAY_SIZE(table); i++) {
		u64 found, now;

		has[i] = msr_probe(table[i].msr, &found);
		if (!has[i])
			continue;
		results.checks[CHECK_MSR].value++;
		if (!table[i].writable)
			continue;
		writable[i] = msr_try(table[i].msr, fresh(0, i)) && msr_probe(table[i].msr, &now) && now == fresh(0, i);
		msr_try(table[i].msr, found);
	}
	return results.checks[CHECK_MSR].value;
}

static void begin(struct vcpu *v)
{
	for (u32 i = 0; i < ARRAY_SIZE(table); i++) {
		if (writable[i])
			wrmsr(table[i].msr, fresh(v->index, i));
		if (has[i])
			held[v->index].expected[i] = rdmsr(table[i].msr);
	}
}

static void turn(struct vcpu *v)
{
	u32 i = held[v->index].next++;

	if (i == ARRAY_SIZE(table)) {
		held[v->index].next = 0;
		held[v->index].round++;
		return;
	}
	if (!has[i])
		return;
	expect(v, CHECK_MSR, held[v->index].expected[i], rdmsr(table[i].msr), table[i].msr);
	if (writable[i]) {
		held[v->index].expected[i] = fresh(v->index, i);
		wrmsr(table[i].msr, held[v->index].expected[i]);
	}
	count(v, CHECK_MSR);
}

const struct check check_msr = { .id = CHECK_MSR, .name = "msr", .prepare = prepare, .begin = begin, .turn = turn };
