/*
 * pit: the PIT's interrupts keep step with the TSC, and its channels keep their modes. In all, never more interrupts than the
 * time makes; in each second, at least half of what the time outside gaps makes (a PIT that is moved begins its period anew,
 * and a VMM need not make up for lost ticks). Where: 0 too many, 1 too few, 2 and 3 the mode of channel 0 and 2.
 */
#include "boot.h"
#include "cpu.h"
#include "interrupt.h"
#include "ports.h"
#include "sentinel.h"

#define RATE_HZ 50
#define WINDOW_US 1000000
#define SLACK 3 /* interrupts */
#define READ_BACK_STATUS(channel) (u8)(0xe0 | 2 << (channel))
#define STATUS_MODE 0x3f /* access, mode, BCD */
#define CHANNEL2_LOHI_MODE3 0xb6

static volatile u64 interrupts;
static u32 divisor;
static u64 first_tsc, window_tsc, window_interrupts, window_gap_cycles;
static u8 modes[3];

INTERRUPT static void on_pit(struct interrupt_frame *frame)
{
	(void)frame;
	interrupts++;
	this_vcpu()->interrupts++;
	pic_eoi();
}

static u8 mode_of(u32 channel)
{
	out8(PIT_COMMAND, READ_BACK_STATUS(channel));
	return in8((u16)(PIT_CHANNEL0 + channel)) & STATUS_MODE;
}

static bool prepare(void)
{
	const u32 needed = BOOT_IRQCHIP | BOOT_PIT;

	if ((boot_info()->flags & needed) != needed)
		return false;
	interrupt_claim(VECTOR_PIC_MASTER, on_pit);
	return true;
}

static void open_window(struct vcpu *v, u64 now)
{
	window_tsc = now;
	window_interrupts = interrupts;
	window_gap_cycles = v->results->gap_cycles;
}

static void begin(struct vcpu *v)
{
	divisor = pit_start(RATE_HZ);
	out8(PIT_COMMAND, CHANNEL2_LOHI_MODE3);
	out8(PIT_CHANNEL2, 0x34);
	out8(PIT_CHANNEL2, 0x12);
	modes[0] = mode_of(0);
	modes[2] = mode_of(2);
	pic_unmask(0);
	first_tsc = rdtsc();
	open_window(v, first_tsc);
}

/* Interrupts that the PIT makes in that time. A second's cycles fit 32 bits or a few more; the product, hours. */
static u64 made_in(u64 cycles)
{
	return cycles / 1000 * PIT_HZ / ((u64)results.tsc_khz * divisor);
}

static void turn(struct vcpu *v)
{
	u64 now = v->now, lost, wanted, had;

	if (now - window_tsc < microseconds(WINDOW_US))
		return;
	expect(v, CHECK_PIT, modes[0], mode_of(0), 2);
	expect(v, CHECK_PIT, modes[2], mode_of(2), 3);
	wanted = made_in(now - first_tsc) + SLACK;
	if (interrupts > wanted)
		violate(v, CHECK_PIT, wanted, interrupts, 0);
	lost = v->results->gap_cycles - window_gap_cycles;
	wanted = lost < now - window_tsc ? made_in(now - window_tsc - lost) / 2 : 0;
	had = interrupts - window_interrupts;
	if (had + SLACK < wanted)
		violate(v, CHECK_PIT, wanted, had, 1);
	open_window(v, now);
	v->results->counts[CHECK_PIT] = interrupts;
}

const struct check check_pit = {
	.id = CHECK_PIT,
	.name = "pit",
	.flags = FIRST_CPU,
	.prepare = prepare,
	.begin = begin,
	.turn = turn,
};
