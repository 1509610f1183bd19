/*
 * timer: each vCPU's LAPIC timer comes when it is due, by the TSC: not early, and not never. It goes through the timer's modes
 * in turn: TSC deadline (if CPUID has it), one-shot, periodic. Where: the mode. Expected, seen: TSC. And in periodic mode none
 * is lost but in a gap, where several become one. Where: 3. Expected, seen: interrupts.
 */
#include "boot.h"
#include "cpu.h"
#include "interrupt.h"
#include "sentinel.h"

#define PERIOD_US 20000
#define IN_A_MODE 50 /* interrupts */
#define SLACK_US 200 /* early: what the bus clock may be off against the TSC in one period */
#define MAY_MISS 2 /* interrupts: one is on its way, one is what the bus clock may be off in all */
#define HYPERVISOR_LEAF 0x40000000 /* EAX: the last of these leaves */
#define TIMING_LEAF 0x40000010 /* EBX: the bus clock in kHz */
#define CALIBRATION_US 5000
#define CPUID1_ECX_TSC_DEADLINE (1u << 24)
#define CALIBRATIONS 20 /* at most: one in which the vCPU stood still at the wrong moment says nothing */
#define READING_US 50
#define LONGEST 0xffffffffu

enum mode { DEADLINE, ONESHOT, PERIODIC, MODES };

#define TOO_FEW MODES /* as where */

static const u32 lvt[MODES] = { LVT_TIMER_TSC_DEADLINE, LVT_TIMER_ONESHOT, LVT_TIMER_PERIODIC };

static struct timer {
	volatile enum mode mode;
	volatile u32 left; /* interrupts in this mode */
	u32 looks; /* at an overdue one */
	bool stray; /* one of the first two here may still be of the mode before */
	volatile u64 due;
	u64 overdue_since;
	volatile u64 periodic_since;
	volatile u64 gaps_before, cycles_before; /* gaps until then, and cycles of them */
} timers[MAX_CPUS];
static u64 period, slack; /* TSC cycles */
static u32 bus_period; /* LAPIC timer counts */
static bool has_deadline;

u64 timer_due(struct vcpu *v)
{
	return timers[v->index].due;
}

static void enter_mode(struct vcpu *v, struct timer *t, u64 now)
{
	t->stray = t->mode == PERIODIC; /* which may have come due again before it is stopped here */
	if (t->stray)
		lapic_write(LAPIC_TIMER_INITIAL, 0);
	if (++t->mode >= MODES)
		t->mode = has_deadline ? DEADLINE : ONESHOT;
	t->left = IN_A_MODE;
	t->periodic_since = now;
	t->gaps_before = v->results->gaps_done;
	t->cycles_before = v->results->gap_cycles;
	lapic_write(LAPIC_LVT_TIMER, lvt[t->mode] | VECTOR_TIMER);
	if (t->mode == PERIODIC)
		lapic_write(LAPIC_TIMER_INITIAL, bus_period);
}

static void arm(struct timer *t, u64 now)
{
	t->overdue_since = 0;
	t->due = now + period;
	if (t->mode == DEADLINE)
		wrmsr(MSR_TSC_DEADLINE, t->due);
	else if (t->mode == ONESHOT)
		lapic_write(LAPIC_TIMER_INITIAL, bus_period);
}

/* In periodic mode an interrupt that was served late is followed by one that seems early: there the sum counts. */
static u64 earliest(const struct timer *t)
{
	if (t->mode == PERIODIC)
		return t->periodic_since + period * (IN_A_MODE - t->left + 1) - slack * IN_A_MODE;
	return t->due - slack;
}

INTERRUPT static void on_timer(struct interrupt_frame *frame)
{
	struct vcpu *v = this_vcpu();
	struct timer *t = &timers[v->index];
	u64 now = rdtsc();

	(void)frame;
	v->interrupts++;
	if (now < earliest(t)) {
		if (!t->stray)
			violate(v, CHECK_TIMER, earliest(t), now, t->mode);
		t->stray = false;
		lapic_eoi();
		return;
	}
	if (t->left < IN_A_MODE)
		t->stray = false;
	count(v, CHECK_TIMER);
	if (!--t->left)
		enter_mode(v, t, now);
	arm(t, now);
	lapic_eoi();
}

/* The bus clock against the TSC; returns the cycles that the TSC may have been read too late, at the start or at the end. */
static u64 calibrate_once(u32 *measured)
{
	u64 before, start, read, end, off;
	u32 left;

	before = rdtsc();
	lapic_write(LAPIC_TIMER_INITIAL, LONGEST);
	start = rdtsc();
	while (rdtsc() - start < microseconds(CALIBRATION_US))
		pause();
	read = rdtsc();
	left = lapic_read(LAPIC_TIMER_CURRENT);
	end = rdtsc();
	off = start - before > end - read ? start - before : end - read;
	lapic_write(LAPIC_TIMER_INITIAL, 0);
	*measured = (u32)((u64)(LONGEST - left) * period / (end - start));
	return off;
}

static void calibrate(void)
{
	u64 off, best = ~0ull;
	u32 measured;

	lapic_write(LAPIC_LVT_TIMER, LVT_MASKED | VECTOR_TIMER);
	for (u32 tries = CALIBRATIONS; best > microseconds(READING_US) && tries; tries--) {
		off = calibrate_once(&measured);
		if (off < best) {
			best = off;
			bus_period = measured;
		}
	}
}

/* By what the VMM says of the bus clock; measured where it says nothing, as well as that can be done. */
static void learn_bus_period(void)
{
	u32 khz = cpuid(HYPERVISOR_LEAF, 0).eax >= TIMING_LEAF ? cpuid(TIMING_LEAF, 0).ebx : 0;

	lapic_write(LAPIC_TIMER_DIVIDE, LAPIC_DIVIDE_BY_1);
	if (khz)
		bus_period = (u32)((u64)khz * PERIOD_US / 1000);
	else
		calibrate();
}

static bool prepare(void)
{
	if (!(boot_info()->flags & BOOT_IRQCHIP))
		return false;
	period = microseconds(PERIOD_US);
	slack = microseconds(SLACK_US);
	has_deadline = cpuid(1, 0).ecx & CPUID1_ECX_TSC_DEADLINE;
	lapic_init(true);
	learn_bus_period();
	interrupt_claim(VECTOR_TIMER, on_timer);
	return true;
}

/* In the first turn and not before: from there on a gap is noted. */
static void begin(struct vcpu *v, struct timer *t)
{
	t->mode = v->index % MODES;
	enter_mode(v, t, v->now);
	arm(t, v->now);
}

/*
 * The interrupts of one gap become one: as many are lost as it has periods, and one more where it lies so. A gap before
 * `periodic_since` that is noted after it only makes this less strict.
 */
static void verify_number(struct vcpu *v, const struct timer *t)
{
	u64 since = t->periodic_since, made, seen;
	u64 lost = (v->results->gap_cycles - t->cycles_before) / period + v->results->gaps_done - t->gaps_before;

	if (t->mode != PERIODIC || v->now < since)
		return;
	made = (v->now - since) / period;
	seen = IN_A_MODE - t->left;
	if (t->periodic_since == since && seen + lost + MAY_MISS < made)
		violate(v, CHECK_TIMER, made - lost, seen, TOO_FEW);
}

static void turn(struct vcpu *v)
{
	struct timer *t = &timers[v->index];

	if (!t->due) {
		begin(v, t);
		return;
	}
	verify_number(v, t);
	if (v->now <= t->due)
		return;
	if (!t->overdue_since) {
		t->overdue_since = v->now;
		t->looks = 0;
	} else if (++t->looks > STALL_LOOKS && v->now - t->overdue_since > stall_cycles) {
		violate(v, CHECK_TIMER, t->due, v->now, t->mode);
	}
}

const struct check check_timer = {
	.id = CHECK_TIMER,
	.name = "timer",
	.prepare = prepare,
	.turn = turn,
};
