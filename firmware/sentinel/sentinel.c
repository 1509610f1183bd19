/*
 * sentinel's loop. Options (README.md has them all): checks=, skip=, fpu=, gap_us=, poll_us=, rounds=.
 * Keys: r, a report; x, a report and the end.
 */
#include "sentinel.h"

#include "boot.h"
#include "cpu.h"
#include "interrupt.h"
#include "panic.h"
#include "serial.h"
#include "smp.h"

#define STACK_SIZE 4096

static const struct check *const checks[] = {
	&check_tsc,
	&check_counter,
	&check_pattern,
	&check_cpus,
	&check_tscsync,
	&check_ipi,
	&check_nmi,
	&check_pit,
	&check_timer,
	&check_hlt,
	&check_debug,
	&check_registers,
	&check_kvmclock,
	&check_paging,
	&check_lapic,
	&check_pic,
	&check_ioapic,
	&check_pio,
	&check_mmio,
	&check_ports,
	&check_posted,
	&check_exception,
	&check_shadow,
	&check_x87,
	&check_xmm,
	&check_ymm,
	&check_msr, /* these three also hold what they find, so they come after all that change it */
	&check_control,
	&check_cpuid,
	&check_mtrr,
};

struct vcpu vcpus[MAX_CPUS];
u32 cpu_count = 1;
u64 stall_cycles;

static u8 stacks[MAX_CPUS][STACK_SIZE] __attribute__((aligned(16)));
static u64 rounds_wanted;
static u64 poll_cycles; /* between two looks at COM1, each of which is an exit to the VMM */

static enum check_state wanted(const struct check *check)
{
	if (check->flags & FPU && !option_number("fpu", 0))
		return CHECK_OFF;
	if (option_text("checks") && !option_lists("checks", check->name))
		return CHECK_OFF;
	if (option_lists("skip", check->name))
		return CHECK_OFF;
	return !check->prepare || check->prepare() ? CHECK_ON : CHECK_UNAVAILABLE;
}

/* An NMI wakes up a halted vCPU too. (One that has not begun has a GS.base of 0, where there are zeros.) */
static void on_nmi(void)
{
	struct vcpu *v = this_vcpu();

	if (v)
		v->interrupts++;
}

static void prepare_checks(void)
{
	for (u32 i = 0; i < ARRAY_SIZE(checks); i++) {
		struct check_results *r = &results.checks[checks[i]->id];

		for (u32 c = 0; checks[i]->name[c] && c < sizeof r->name - 1; c++)
			r->name[c] = checks[i]->name[c];
		r->state = wanted(checks[i]);
		r->id = checks[i]->id;
	}
}

static void begin_checks(struct vcpu *v)
{
	const struct check *often = NULL;

	for (u32 i = 0; i < ARRAY_SIZE(checks); i++) {
		const struct check *check = checks[i];

		if (results.checks[check->id].state != CHECK_ON || (check->flags & FIRST_CPU && v->index))
			continue;
		if (check->begin)
			check->begin(v);
		if (check->flags & EVERY_TURN) {
			v->every[v->every_count++] = check->turn;
		} else {
			v->rotating[v->rotating_count++] = check->turn;
			if (check->flags & OFTEN)
				often = check;
			else if (often)
				v->rotating[v->rotating_count++] = often->turn;
		}
	}
}

static inline void console_turn(struct vcpu *v)
{
	if (report_active)
		report_turn();
	if (v->now - v->polled < poll_cycles)
		return;
	v->polled = v->now;
	results.nmis = nmi_count();
	if (rounds_wanted && results.rounds >= rounds_wanted)
		report_request(true);
	switch (serial_get()) {
	case 'r':
		report_request(false);
		break;
	case 'x':
		report_request(true);
		break;
	}
}

static inline void take_time(struct vcpu *v)
{
	struct cpu_results *r = v->results;
	u64 now = rdtsc(), before = r->last_tsc;

	v->now = now;
	v->before = before;
	r->last_tsc = now;
	r->turns++;
	if (now > before && now - before > results.gap_threshold)
		results_gap(r, before, now - before);
}

__attribute__((noreturn)) static void run(struct vcpu *v)
{
	for (;;) {
		take_time(v);
		for (u32 i = 0; i < v->every_count; i++)
			v->every[i](v);
		if (v->rotating_count) {
			if (v->rotating_next == v->rotating_count)
				v->rotating_next = 0;
			v->rotating[v->rotating_next++](v);
		}
		if (!v->index)
			console_turn(v);
	}
}

static void begin_cpu(struct vcpu *v)
{
	wrmsr(MSR_GS_BASE, (u64)v);
	interrupts_init();
	if (boot_info()->flags & BOOT_IRQCHIP)
		lapic_init(v->index == 0);
	begin_checks(v);
	interrupts_on();
}

static void other_cpu(void *argument)
{
	struct vcpu *v = argument;

	begin_cpu(v);
	results_cpu_init(v->results, v->index);
	run(v);
}

static void start_others(void)
{
	for (u32 i = 1; i < results.cpus; i++) {
		results.cpu[i].state = CPU_STARTING;
		if (!smp_start(i, other_cpu, &vcpus[i], stacks[i] + STACK_SIZE, results.tsc_khz))
			panic(PANIC_SMP, "a vCPU did not start");
		cpu_count = i + 1;
	}
}

int main(void)
{
	const struct boot_info *info = boot_info();

	serial_init();
	results_init(info->flags & BOOT_IRQCHIP ? info->cpus : 1, info->tsc_khz, option_number("gap_us", 200));
	stall_cycles = microseconds(option_number("stall_ms", STALL_MS) * 1000);
	rounds_wanted = option_number("rounds", 0);
	poll_cycles = microseconds(option_number("poll_us", 10000));
	for (u32 i = 0; i < MAX_CPUS; i++) {
		vcpus[i].self = &vcpus[i];
		vcpus[i].index = i;
		vcpus[i].results = &results.cpu[i];
	}
	interrupts_init();
	nmi_claim(on_nmi);
	if (info->flags & BOOT_IRQCHIP)
		pic_init();
	prepare_checks();
	begin_cpu(&vcpus[0]);
	start_others();
	results_cpu_init(&results.cpu[0], 0);
	results.state = GUEST_RUNNING;
	run(&vcpus[0]);
}
