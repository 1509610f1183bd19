/*
 * sentinel: a guest that checks itself while it runs. A check is one file, check_NAME.c, with one `struct check`, listed in
 * sentinel.c; all that a check needs to know about the others is here.
 */
#ifndef SENTINEL_H
#define SENTINEL_H

#include "results.h"
#include "types.h"

/* A check's number: its slot in the results area and the debug-exit code of its violation. Never reused. */
enum check_id {
	CHECK_COUNTER = 1,
	CHECK_PATTERN = 2,
	CHECK_TSC = 3,
	CHECK_CPUS = 4,
	CHECK_TSCSYNC = 5,
	CHECK_IPI = 6,
	CHECK_PIT = 7,
	CHECK_TIMER = 8,
	CHECK_HLT = 9,
	CHECK_MSR = 10,
	CHECK_DEBUG = 11,
	CHECK_KVMCLOCK = 12,
	CHECK_PAGING = 13,
	CHECK_PIO = 14,
	CHECK_MMIO = 15,
	CHECK_X87 = 16,
	CHECK_XMM = 17,
	CHECK_YMM = 18,
	CHECK_REGISTERS = 19,
	CHECK_CONTROL = 20,
	CHECK_CPUID = 21,
	CHECK_LAPIC = 22,
	CHECK_PIC = 23,
	CHECK_IOAPIC = 24,
	CHECK_MTRR = 25,
	CHECK_NMI = 26,
	CHECK_PORTS = 27,
	CHECK_POSTED = 28,
	CHECK_EXCEPTION = 29,
	CHECK_SHADOW = 30,
};

/*
 * Something that must come is missing after that many looks and that long (option stall_ms=). Both, because after a pause the
 * time alone is over at once; and long, because a host with fewer CPUs than vCPUs runs each only now and then.
 */
#define STALL_LOOKS 100
#define STALL_MS 10000
extern u64 stall_cycles;

/* What belongs to one vCPU and no check. GS.base points to it. */
struct vcpu {
	struct vcpu *self;
	u32 index; /* also its APIC ID */
	u64 polled; /* the console: when, by the TSC */
	struct cpu_results *results;
	volatile u64 interrupts; /* of all kinds, raised by each handler */
	u64 now; /* TSC at the start of this turn */
	u64 before; /* and of the turn before */
	u32 every_count, rotating_count, rotating_next;
	void (*every[CHECK_SLOTS])(struct vcpu *);
	void (*rotating[2 * CHECK_SLOTS])(struct vcpu *);
};

enum check_flags {
	EVERY_TURN = 1, /* else the checks take turns, one in each loop turn */
	OFTEN = 2, /* that, but every other turn is this one's; for one check at most */
	FIRST_CPU = 4, /* else on every vCPU */
	FPU = 8, /* executes FPU instructions, which not every KVM can emulate: only with the option fpu=1 */
};

struct check {
	enum check_id id;
	const char *name; /* up to 15 characters */
	u32 flags;
	bool (*prepare)(void); /* once, before other vCPUs run; false: the machine has not got it. May be NULL */
	void (*begin)(struct vcpu *v); /* on each vCPU, before its first turn. May be NULL */
	void (*turn)(struct vcpu *v); /* a few dozen instructions, see README.md */
};

extern const struct check check_tsc, check_counter, check_pattern, check_cpus, check_tscsync, check_ipi, check_pit, check_timer,
	check_hlt, check_msr, check_debug, check_kvmclock, check_paging, check_pio, check_mmio, check_x87, check_xmm, check_ymm,
	check_registers, check_control, check_cpuid, check_lapic, check_pic, check_ioapic, check_mtrr,
	check_nmi, check_ports, check_posted, check_exception, check_shadow;

extern struct vcpu vcpus[MAX_CPUS];
extern u32 cpu_count; /* vCPUs that run */

static inline struct vcpu *this_vcpu(void)
{
	struct vcpu *v;

	__asm__ volatile("movq %%gs:0, %0" : "=r"(v));
	return v;
}

static inline struct vcpu *neighbour(struct vcpu *v)
{
	u32 next = v->index + 1;

	return &vcpus[next < cpu_count ? next : 0];
}

static inline void count(struct vcpu *v, enum check_id id)
{
	v->results->counts[id]++;
}

/* A value that no other vCPU, place or round has. */
static inline u64 unlike(u32 cpu, u32 place, u64 round)
{
	return ((u64)cpu << 56 ^ (u64)place << 48 ^ round) * 0x9e3779b97f4a7c15ull;
}

static inline u64 microseconds(u64 us)
{
	return us * results.tsc_khz / 1000;
}

/* A check's finding: into the results area, as a JSON line on COM1, and the end with debug-exit code `id`. The first one wins. */
__attribute__((noreturn)) void violate(struct vcpu *v, enum check_id id, u64 expected, u64 seen, u64 where);

static inline void expect(struct vcpu *v, enum check_id id, u64 expected, u64 seen, u64 where)
{
	if (expected != seen)
		violate(v, id, expected, seen, where);
}

/* When the LAPIC timer of this vCPU is due; if the timer check is on. */
u64 timer_due(struct vcpu *v);

/* The report, a JSON line on COM1, a byte or a field in a turn. */
extern bool report_active;
void report_request(bool ends_guest);
void report_turn(void);
void report_at_once(void);

#endif
