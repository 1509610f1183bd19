/*
 * ticker: prints `tick N` on COM1 at a human rate and keeps the figures in the results area.
 * Options: rate= ticks a second (10), count= ticks until it ends (0: never), wait=halt|spin, gap_us= (200).
 * wait=halt (the default where there is an irqchip with a PIT): HLT until IRQ 0. wait=spin: polls the TSC, and so sees
 * every pause as a gap. The key q ends it. Always ends with exit code 0.
 */
#include "boot.h"
#include "cpu.h"
#include "format.h"
#include "interrupt.h"
#include "panic.h"
#include "ports.h"
#include "results.h"
#include "serial.h"

#define PIT_RATE_HZ 100
#define MAX_RATE_HZ 1000

static volatile u64 irqs;

INTERRUPT static void on_pit(struct interrupt_frame *frame)
{
	(void)frame;
	irqs++;
	pic_eoi();
}

static void turn(void)
{
	struct cpu_results *cpu = &results.cpu[0];
	u64 now = rdtsc(), last = cpu->last_tsc;

	if (now - last > results.gap_threshold)
		results_gap(cpu, last, now - last);
	cpu->last_tsc = now;
	cpu->turns++;
}

/* Halts until the next PIT interrupt. What HLT waits for is no gap: the clock of the turns starts anew. */
static void wait_halted(void)
{
	static u64 seen;

	interrupts_off();
	while (irqs == seen) {
		interrupts_on_and_halt();
		interrupts_off();
	}
	seen++;
	interrupts_on();
	results.cpu[0].last_tsc = rdtsc();
	turn();
}

/* Polls the TSC until a period has passed since the last one. */
static void wait_spinning(u64 period)
{
	static u64 due;

	if (!due)
		due = rdtsc();
	due += period;
	while (results.cpu[0].last_tsc < due)
		turn();
}

static void say(const char *text)
{
	for (; *text; text++) {
		serial_put(*text);
		turn();
	}
}

static void say_tick(u64 number)
{
	struct text t = { .used = 0 };

	text_string(&t, "tick ");
	text_decimal(&t, number);
	text_string(&t, "\r\n");
	text_char(&t, 0);
	say(t.bytes);
}

int main(void)
{
	const struct boot_info *info = boot_info();
	u64 rate = option_number("rate", 10), count = option_number("count", 0);
	const char *wait = option_text("wait");
	bool halts = (info->flags & (BOOT_IRQCHIP | BOOT_PIT)) == (BOOT_IRQCHIP | BOOT_PIT);
	u64 steps_hz, steps = 0, period;

	if (rate < 1 || rate > MAX_RATE_HZ)
		rate = 10;
	if (wait && option_is(wait, "spin"))
		halts = false;
	steps_hz = rate > PIT_RATE_HZ ? rate : PIT_RATE_HZ;
	period = info->tsc_khz * 1000ull / steps_hz;

	serial_init();
	results_init(1, info->tsc_khz, option_number("gap_us", 200));
	if (halts) {
		interrupts_init();
		interrupt_claim(VECTOR_PIC_MASTER, on_pit);
		pic_init();
		lapic_init(true);
		pit_start((u32)steps_hz);
		pic_unmask(0);
	}
	results_cpu_init(&results.cpu[0], 0);
	results.state = GUEST_RUNNING;

	while (!count || results.ticks < count) {
		if (halts)
			wait_halted();
		else
			wait_spinning(period);
		if (serial_get() == 'q')
			break;
		steps += rate;
		if (steps < steps_hz)
			continue;
		steps -= steps_hz;
		results.ticks++;
		say_tick(results.ticks);
	}
	say("done\r\n");
	results.state = GUEST_ENDED;
	debug_exit(0);
}
