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
};

/* What belongs to one vCPU and no check. GS.base points to it. */
struct vcpu {
	struct vcpu *self;
	u32 index; /* also its APIC ID */
	u32 turns_to_poll; /* of the console */
	struct cpu_results *results;
	u64 now; /* TSC at the start of this turn */
	u64 before; /* and of the turn before */
	u32 every_count, rotating_count, rotating_next;
	void (*every[CHECK_SLOTS])(struct vcpu *);
	void (*rotating[CHECK_SLOTS])(struct vcpu *);
};

enum check_flags {
	EVERY_TURN = 1, /* else the checks take turns, one in each loop turn */
	FIRST_CPU = 2, /* else on every vCPU */
	FPU = 4, /* executes FPU instructions, which not every KVM can emulate: only with the option fpu=1 */
};

struct check {
	enum check_id id;
	const char *name; /* up to 15 characters */
	u32 flags;
	bool (*prepare)(void); /* once, before other vCPUs run; false: the machine has not got it. May be NULL */
	void (*begin)(struct vcpu *v); /* on each vCPU, before its first turn. May be NULL */
	void (*turn)(struct vcpu *v); /* a few dozen instructions, see README.md */
};

extern const struct check check_counter, check_pattern, check_tsc;

extern struct vcpu vcpus[MAX_CPUS];
extern u32 cpu_count; /* vCPUs that run */

static inline struct vcpu *this_vcpu(void)
{
	struct vcpu *v;

	__asm__ volatile("movq %%gs:0, %0" : "=r"(v));
	return v;
}

static inline void count(struct vcpu *v, enum check_id id)
{
	v->results->counts[id]++;
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

/* The report, a JSON line on COM1, a byte or a field in a turn. */
void report_request(bool ends_guest);
void report_turn(void);
void report_at_once(void);

#endif
