/*
 * x87: the control and status words, MXCSR, and the x87 stack hold what was loaded. FXSAVE and FXRSTOR alone are used, which
 * KVM's emulator knows. Where: byte offset in the FXSAVE area.
 */
#include "cpu.h"
#include "sentinel.h"

#define CPUID1_EDX_FXSR (1u << 24)
#define CR0_EM_AND_TS (1ull << 2 | 1ull << 3)
#define CONTROL_WORD 0x0c7f /* all exceptions masked, 24-bit precision, round to zero: not the reset value */
#define MXCSR 0x7f80 /* all exceptions masked, round to zero: not the reset value */
#define VERIFIED 160 /* control words and stack */

struct fx_area {
	u16 control, status;
	u8 tag, reserved;
	u16 opcode;
	u64 ip, dp;
	u32 mxcsr, mxcsr_mask;
	u64 stack[8][2];
	u8 rest[352];
} __attribute__((aligned(16)));

static struct fx_area loaded[MAX_CPUS], seen[MAX_CPUS];
static u8 next[MAX_CPUS];

static bool prepare(void)
{
	return cpuid(1, 0).edx & CPUID1_EDX_FXSR;
}

static void begin(struct vcpu *v)
{
	struct fx_area *area = &loaded[v->index];

	write_cr0(read_cr0() & ~CR0_EM_AND_TS);
	write_cr4(read_cr4() | CR4_OSFXSR);
	__asm__ volatile("fxsave %0" : "+m"(*area));
	area->control = CONTROL_WORD;
	area->status = 0;
	area->tag = 0xff;
	area->mxcsr = MXCSR;
	for (u32 i = 0; i < 8; i++) {
		area->stack[i][0] = unlike(v->index, i, 0) | 1ull << 63; /* a normal number has its integer bit set */
		area->stack[i][1] = 0x3fff;
	}
	__asm__ volatile("fxrstor %0" : : "m"(*area));
}

/* A word of 8 bytes in a turn; what the processor keeps for itself (instruction pointers, the mask) is left out. */
static void turn(struct vcpu *v)
{
	u32 word = next[v->index]++ % (VERIFIED / 8);
	u64 *expected = (u64 *)&loaded[v->index] + word, *now = (u64 *)&seen[v->index] + word, mask = ~0ull;

	if (word == 0)
		mask = 0xffffffffffull; /* without the last opcode */
	else if (word == 1 || word == 2)
		mask = 0;
	else if (word == 3)
		mask = 0xffffffff; /* MXCSR without its mask */
	__asm__ volatile("fxsave %0" : "+m"(seen[v->index]));
	expect(v, CHECK_X87, *expected & mask, *now & mask, word * 8);
	count(v, CHECK_X87);
}

const struct check check_x87 = { .id = CHECK_X87, .name = "x87", .prepare = prepare, .begin = begin, .turn = turn };
