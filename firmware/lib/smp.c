#include "smp.h"

#include "cpu.h"
#include "interrupt.h"
#include "trampoline.h"

#define EFER_LMA (1u << 10) /* set by the processor, not by software */
#define ICR_INIT 0x4500 /* level asserted, edge, delivery mode INIT */
#define ICR_STARTUP 0x4600
#define INIT_WAIT_MS 10
#define STARTUP_REPEAT_MS 100
#define STARTUP_WAIT_MS 10000

struct trampoline_data {
	u64 cr0, cr4, cr3, efer;
	u64 stack_top, entry;
	struct descriptor_pointer gdt_pointer __attribute__((aligned(16)));
	void (*function)(void *);
	void *argument;
	volatile u32 arrived;
};

#define DATA ((struct trampoline_data *)TRAMPOLINE_DATA)

extern const u8 trampoline[], trampoline_end[];

static void arrive(void)
{
	void (*function)(void *) = DATA->function;
	void *argument = DATA->argument;

	barrier();
	DATA->arrived = 1;
	function(argument);
}

static void fill_in(void (*entry)(void *), void *argument, void *stack_top)
{
	for (u32 i = 0; i < (u32)(trampoline_end - trampoline); i++)
		((volatile u8 *)TRAMPOLINE)[i] = trampoline[i];
	__asm__ volatile("sgdt %0" : "=m"(DATA->gdt_pointer));
	DATA->cr0 = read_cr0();
	DATA->cr3 = read_cr3();
	DATA->cr4 = read_cr4();
	DATA->efer = rdmsr(MSR_EFER) & ~(u64)EFER_LMA;
	DATA->stack_top = (u64)stack_top;
	DATA->entry = (u64)arrive;
	DATA->function = entry;
	DATA->argument = argument;
	DATA->arrived = 0;
	barrier();
}

static bool arrives_within(u64 cycles)
{
	u64 start = rdtsc();

	while (!DATA->arrived && rdtsc() - start < cycles)
		pause();
	return DATA->arrived;
}

bool smp_start(u32 apic_id, void (*entry)(void *), void *argument, void *stack_top, u32 tsc_khz)
{
	fill_in(entry, argument, stack_top);
	lapic_send(apic_id, ICR_INIT);
	arrives_within((u64)tsc_khz * INIT_WAIT_MS);
	lapic_send(apic_id, ICR_STARTUP | TRAMPOLINE / PAGE_SIZE);
	if (arrives_within((u64)tsc_khz * STARTUP_REPEAT_MS))
		return true;
	lapic_send(apic_id, ICR_STARTUP | TRAMPOLINE / PAGE_SIZE);
	return arrives_within((u64)tsc_khz * STARTUP_WAIT_MS);
}
