/*
 * The results area: what a guest knows about itself, in its RAM for the host to read while it runs.
 * This header defines the layout; vmm/report/results.py mirrors it. Little endian, naturally aligned, version 1.
 *
 * The host copies the area while the guest writes it, from low to high addresses, so every part is laid out for that:
 * - A u64 alone is always whole. `errors` lies before `violation` and is raised after it is filled in.
 * - A vCPU's gaps lie between `gaps_done` (copied first) and `gaps_begun` (copied last). The guest raises `gaps_begun`,
 *   writes, then raises `gaps_done`. In a copy, entries [max(0, gaps_begun - GAP_SLOTS), gaps_done) of the ring are whole
 *   (entry i is in slot i % GAP_SLOTS), and the totals are whole if both counters are equal.
 */
#ifndef RESULTS_H
#define RESULTS_H

#include "types.h"

#define RESULTS_MAGIC 0x524d4d56u /* "VMMR" */
#define RESULTS_VERSION 1u
#define CHECK_SLOTS 48u
#define GAP_SLOTS 1024u

enum guest_state { GUEST_STARTING, GUEST_RUNNING, GUEST_ENDED, GUEST_VIOLATED };
enum check_state { CHECK_OFF, CHECK_ON, CHECK_UNAVAILABLE }; /* unavailable: wanted, but the machine has not got it */
enum cpu_state { CPU_ABSENT, CPU_STARTING, CPU_RUNNING };

struct violation {
	u32 check; /* number of the check, also the debug-exit code */
	u32 cpu;
	u64 expected;
	u64 seen;
	u64 where; /* what the check says: a guest-physical address, an MSR's number, ... */
	u64 tsc;
};

struct check_results {
	u32 id; /* 0: an empty slot; else its index */
	u32 state; /* enum check_state */
	char name[16]; /* NUL-padded */
	u64 errors;
	u64 expected; /* by the last error */
	u64 seen;
	u64 where;
	u64 value; /* a figure that the check keeps: see the table in README.md */
};

struct gap {
	u64 start_tsc; /* the last turn before the gap */
	u64 cycles;
};

struct cpu_results {
	u32 apic_id;
	u32 state; /* enum cpu_state */
	u64 first_tsc;
	u64 last_tsc; /* latest loop turn */
	u64 turns; /* loop turns, raised on each: the guest is alive while this moves */
	u64 counts[CHECK_SLOTS]; /* what each check has done here, by its number */
	u64 reserved[3];
	u64 gaps_done;
	u64 gap_cycles; /* sum of all gaps */
	u64 largest_gap_start;
	u64 largest_gap_cycles;
	struct gap gaps[GAP_SLOTS];
	u64 gaps_begun;
	u64 reserved2[68];
};

struct results {
	u32 magic; /* written last by results_init() */
	u32 version;
	u64 size; /* of the whole area */
	u32 cpus;
	u32 tsc_khz;
	u32 check_slots;
	u32 gap_slots;
	u64 gap_threshold; /* cycles; a longer step between two turns is a gap */
	u64 start_tsc;
	u32 state; /* enum guest_state */
	u32 reserved;
	u64 ticks; /* a counter that the guest raises by one at a time and checks */
	u64 rounds; /* times that the whole pattern was verified and rewritten */
	u64 pattern_bytes; /* guest memory that the pattern covers */
	u64 nmis;
	u64 errors;
	struct violation violation; /* the first; valid once errors > 0 */
	u8 reserved2[376];
	struct check_results checks[CHECK_SLOTS];
	u8 reserved3[512];
	struct cpu_results cpu[MAX_CPUS];
};

#define RESULTS_GPA 0x200000
#define RESULTS_SIZE 0x111000

_Static_assert(sizeof(struct check_results) == 64, "a check's entry is 64 bytes");
_Static_assert(__builtin_offsetof(struct results, checks) == 512, "the header is 512 bytes");
_Static_assert(__builtin_offsetof(struct results, cpu) == 4096, "vCPUs start on the second page");

extern struct results results;

/* Fills in the header; the magic last. `cpus` and `tsc_khz` as the boot info has them. */
void results_init(u32 cpus, u32 tsc_khz, u64 gap_us);
/* Begins a vCPU's turns: its clock starts now. */
void results_cpu_init(struct cpu_results *cpu, u32 apic_id);
/* A gap of `cycles` after `start_tsc`: into the totals and the ring. */
void results_gap(struct cpu_results *cpu, u64 start_tsc, u64 cycles);

#endif
