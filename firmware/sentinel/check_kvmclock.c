/*
 * kvmclock: KVM's paravirtual clock never goes back, keeps step with the TSC, and is not behind another vCPU's.
 * The wall clock: KVM keeps the address where it is to be written, and writes there when it is told so and never else.
 * Where: 0 went back, 1 away from the TSC, 2 behind the neighbour's, 3 the page is never stable (expected, seen: ns); 4 the
 * wall clock's address, 5 what is there.
 * Value: how far it is ahead of the TSC since the start, in ns (two's complement), on the vCPU that looked last.
 * Source: Linux Documentation/virt/kvm/x86/msr.rst and cpuid.rst.
 */
#include "cpu.h"
#include "sentinel.h"

#define CPUID_KVM_SIGNATURE 0x40000000
#define CPUID_KVM_FEATURES 0x40000001
#define SIGNATURE_EBX 0x4b4d564b /* "KVMK" */
#define FEATURE_CLOCKSOURCE2 (1u << 3)
#define MSR_KVM_SYSTEM_TIME 0x4b564d01
#define MSR_KVM_WALL_CLOCK 0x4b564d00
#define ENABLE 1
#define FLAG_TSC_STABLE 1
#define TRIES 1000
#define SLACK_STABLE_NS 10000 /* between vCPUs, and for TSC reads that are not ordered */
#define SLACK_UNSTABLE_NS 5000000 /* without that flag KVM promises monotonicity on no pair of vCPUs */
#define DRIFT_NS 2000000 /* what setting the clock anew may add, and: */
#define DRIFT_PART 2000 /* the host's clock may be slewed by 1/2000 (500 ppm) */

static struct pvclock {
	volatile u32 version;
	u32 pad;
	u64 tsc_timestamp;
	u64 system_time;
	u32 tsc_to_system_mul;
	s8 tsc_shift;
	u8 flags;
	u8 pad2[2];
} __attribute__((aligned(64))) pages[MAX_CPUS];

static struct {
	u64 first_ns, first_tsc;
	volatile u64 last_ns;
	u64 tsc;
	u8 flags;
} clocks[MAX_CPUS];

static volatile u32 wall_clock[3] __attribute__((aligned(16))); /* version, seconds, nanoseconds */

/* Has KVM write the time, and then keeps numbers of its own there. */
static void set_wall_clock(void)
{
	wrmsr(MSR_KVM_WALL_CLOCK, (u64)wall_clock);
	for (u32 i = 0; i < ARRAY_SIZE(wall_clock); i++)
		wall_clock[i] = (u32)unlike(0, i, 0);
}

static void verify_wall_clock(void)
{
	expect(&vcpus[0], CHECK_KVMCLOCK, (u64)wall_clock, rdmsr(MSR_KVM_WALL_CLOCK), 4);
	for (u32 i = 0; i < ARRAY_SIZE(wall_clock); i++)
		expect(&vcpus[0], CHECK_KVMCLOCK, (u32)unlike(0, i, 0), wall_clock[i], 5);
}

static u64 scale(u64 cycles, u32 mul, s8 shift)
{
	cycles = shift < 0 ? cycles >> -shift : cycles << shift;
	return (u64)((unsigned __int128)cycles * mul >> 32);
}

static u64 read(struct vcpu *v)
{
	struct pvclock *p = &pages[v->index];

	for (u32 tries = TRIES; tries; tries--) {
		u32 version = p->version;
		u64 ns, tsc = rdtsc();

		barrier();
		ns = p->system_time + scale(tsc - p->tsc_timestamp, p->tsc_to_system_mul, p->tsc_shift);
		clocks[v->index].tsc = tsc;
		clocks[v->index].flags = p->flags;
		barrier();
		if (!(version & 1) && version == p->version)
			return ns;
	}
	violate(v, CHECK_KVMCLOCK, 0, p->version, 3);
}

static u64 ns_per_cycle; /* times 2^32 */

static bool prepare(void)
{
	ns_per_cycle = (1000000ull << 32) / results.tsc_khz;
	return cpuid(CPUID_KVM_SIGNATURE, 0).ebx == SIGNATURE_EBX && cpuid(CPUID_KVM_FEATURES, 0).eax & FEATURE_CLOCKSOURCE2;
}

static void begin(struct vcpu *v)
{
	if (!v->index)
		set_wall_clock();
	wrmsr(MSR_KVM_SYSTEM_TIME, (u64)&pages[v->index] | ENABLE);
	clocks[v->index].first_ns = clocks[v->index].last_ns = read(v);
	clocks[v->index].first_tsc = clocks[v->index].tsc;
}

static u64 nanoseconds(u64 cycles)
{
	return (u64)((unsigned __int128)cycles * ns_per_cycle >> 32);
}

static void turn(struct vcpu *v)
{
	u32 me = v->index;
	u64 others = clocks[neighbour(v)->index].last_ns, now = read(v), slack, by_tsc, off;

	if (!me)
		verify_wall_clock();
	slack = clocks[me].flags & FLAG_TSC_STABLE ? SLACK_STABLE_NS : SLACK_UNSTABLE_NS;
	if (now + slack < clocks[me].last_ns)
		violate(v, CHECK_KVMCLOCK, clocks[me].last_ns, now, 0);
	if (now + slack < others)
		violate(v, CHECK_KVMCLOCK, others, now, 2);
	clocks[me].last_ns = now;
	by_tsc = clocks[me].first_ns + nanoseconds(clocks[me].tsc - clocks[me].first_tsc);
	off = now - by_tsc;
	results.checks[CHECK_KVMCLOCK].value = off;
	if (off >> 63)
		off = -off;
	if (off > DRIFT_NS + (now - clocks[me].first_ns) / DRIFT_PART)
		violate(v, CHECK_KVMCLOCK, by_tsc, now, 1);
	count(v, CHECK_KVMCLOCK);
}

const struct check check_kvmclock = {
	.id = CHECK_KVMCLOCK,
	.name = "kvmclock",
	.prepare = prepare,
	.begin = begin,
	.turn = turn,
};
