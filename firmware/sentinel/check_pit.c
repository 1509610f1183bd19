/*
 * pit: the PIT's interrupts come, never more of them than the time makes, and its channels keep their modes and channel 0 its
 * reload value. (How many are late, and whether lost ones are made up for, is the VMM's and its host's business.)
 * Where: 0 too many, 1 none for too long, 2 and 3 the mode of channel 0 and 2, 4 the count of channel 0.
 */
#include "boot.h"
#include "cpu.h"
#include "interrupt.h"
#include "ports.h"
#include "sentinel.h"

#define RATE_HZ 50
#define WINDOW_US 200000
#define SLACK 3 /* interrupts */
#define READ_BACK_STATUS(channel) (u8)(0xe0 | 2 << (channel))
#define LATCH_COUNT(channel) (u8)((channel) << 6)
#define STATUS_MODE 0x3f /* access, mode, BCD */
#define CHANNEL2_LOHI_MODE3 0xb6

static volatile u64 interrupts;
static u32 divisor;
static u64 first_tsc, looked_tsc;
static u64 seen_interrupts, seen_since;
static u32 looks;
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

static u32 count_of(u32 channel)
{
	u16 port = (u16)(PIT_CHANNEL0 + channel);
	u32 low;

	out8(PIT_COMMAND, LATCH_COUNT(channel));
	low = in8(port);
	return low | (u32)in8(port) << 8;
}

static void begin(struct vcpu *v)
{
	(void)v;
	divisor = pit_start(RATE_HZ);
	out8(PIT_COMMAND, CHANNEL2_LOHI_MODE3);
	out8(PIT_CHANNEL2, 0x34);
	out8(PIT_CHANNEL2, 0x12);
	modes[0] = mode_of(0);
	modes[2] = mode_of(2);
	pic_unmask(0);
	first_tsc = looked_tsc = seen_since = rdtsc();
}

/* Interrupts that the PIT makes in that time. A second's cycles fit 32 bits or a few more; the product, hours. */
static u64 made_in(u64 cycles)
{
	return cycles / 1000 * PIT_HZ / ((u64)results.tsc_khz * divisor);
}

static void verify_channels(struct vcpu *v)
{
	u32 left = count_of(0);

	expect(v, CHECK_PIT, modes[0], mode_of(0), 2);
	expect(v, CHECK_PIT, modes[2], mode_of(2), 3);
	if (left > divisor)
		violate(v, CHECK_PIT, divisor, left, 4);
}

static void verify_interrupts(struct vcpu *v)
{
	u64 now = interrupts; /* before the TSC: if the vCPU stood still since `now`, its ticks come all at once */
	u64 most = made_in(rdtsc() - first_tsc) + SLACK;

	if (now > most)
		violate(v, CHECK_PIT, most, now, 0);
	if (now != seen_interrupts) {
		seen_interrupts = now;
		seen_since = v->now;
		looks = 0;
	} else if (++looks > STALL_LOOKS && v->now - seen_since > stall_cycles) {
		violate(v, CHECK_PIT, now + 1, now, 1);
	}
}

static void turn(struct vcpu *v)
{
	verify_interrupts(v);
	if (v->now - looked_tsc > microseconds(WINDOW_US)) {
		verify_channels(v);
		looked_tsc = v->now;
	}
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
