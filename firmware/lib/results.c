#include "results.h"

#include "cpu.h"

struct results results __attribute__((section(".results"), aligned(4096)));

_Static_assert(sizeof results == RESULTS_SIZE, "the note says how large the results area is");

void results_init(u32 cpus, u32 tsc_khz, u64 gap_us)
{
	results.version = RESULTS_VERSION;
	results.size = sizeof results;
	results.cpus = cpus < MAX_CPUS ? cpus : MAX_CPUS;
	results.tsc_khz = tsc_khz;
	results.check_slots = CHECK_SLOTS;
	results.gap_slots = GAP_SLOTS;
	results.gap_threshold = gap_us * tsc_khz / 1000;
	results.start_tsc = rdtsc();
	barrier();
	results.magic = RESULTS_MAGIC;
}

void results_cpu_init(struct cpu_results *cpu, u32 apic_id)
{
	cpu->apic_id = apic_id;
	cpu->first_tsc = cpu->last_tsc = rdtsc();
	barrier();
	cpu->state = CPU_RUNNING;
}

void results_gap(struct cpu_results *cpu, u64 start_tsc, u64 cycles)
{
	u64 head = cpu->gaps_done;
	struct gap *gap = &cpu->gaps[head % GAP_SLOTS];

	cpu->gaps_begun = head + 1;
	barrier();
	gap->start_tsc = start_tsc;
	gap->cycles = cycles;
	cpu->gap_cycles += cycles;
	if (cycles > cpu->largest_gap_cycles) {
		cpu->largest_gap_start = start_tsc;
		cpu->largest_gap_cycles = cycles;
	}
	barrier();
	cpu->gaps_done = head + 1;
}
