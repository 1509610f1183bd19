/* The instructions that C has no words for. Instructions that KVM's emulator lacks (fences, RDTSCP, POPCNT, SSE) are not used here. */
#ifndef CPU_H
#define CPU_H

#include "types.h"

#define MSR_APIC_BASE 0x1b
#define MSR_TSC_DEADLINE 0x6e0
#define MSR_EFER 0xc0000080
#define MSR_GS_BASE 0xc0000101

#define CR4_OSFXSR (1ull << 9)
#define CR4_OSXSAVE (1ull << 18)

static inline void out8(u16 port, u8 value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline void out16(u16 port, u16 value)
{
	__asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline u8 in8(u16 port)
{
	u8 value;

	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline u32 in32(u16 port)
{
	u32 value;

	__asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline void out32(u16 port, u32 value)
{
	__asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline u64 rdtsc(void)
{
	u32 low, high;

	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (u64)high << 32 | low;
}

static inline u64 rdmsr(u32 msr)
{
	u32 low, high;

	__asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr) : "memory");
	return (u64)high << 32 | low;
}

static inline void wrmsr(u32 msr, u64 value)
{
	__asm__ volatile("wrmsr" : : "c"(msr), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}

struct cpuid {
	u32 eax, ebx, ecx, edx;
};

static inline struct cpuid cpuid(u32 leaf, u32 subleaf)
{
	struct cpuid r;

	__asm__ volatile("cpuid" : "=a"(r.eax), "=b"(r.ebx), "=c"(r.ecx), "=d"(r.edx) : "a"(leaf), "c"(subleaf));
	return r;
}

#define CONTROL_REGISTER(name)                                                      \
	static inline u64 read_##name(void)                                         \
	{                                                                           \
		u64 value;                                                          \
                                                                                    \
		__asm__ volatile("mov %%" #name ", %0" : "=r"(value) : : "memory"); \
		return value;                                                       \
	}                                                                           \
	static inline void write_##name(u64 value)                                  \
	{                                                                           \
		__asm__ volatile("mov %0, %%" #name : : "r"(value) : "memory");     \
	}

CONTROL_REGISTER(cr0)
CONTROL_REGISTER(cr2)
CONTROL_REGISTER(cr3)
CONTROL_REGISTER(cr4)
CONTROL_REGISTER(cr8)
CONTROL_REGISTER(dr0)
CONTROL_REGISTER(dr1)
CONTROL_REGISTER(dr2)
CONTROL_REGISTER(dr3)
CONTROL_REGISTER(dr6)
CONTROL_REGISTER(dr7)

static inline void invlpg(u64 address)
{
	__asm__ volatile("invlpg (%0)" : : "r"(address) : "memory");
}

struct descriptor_pointer {
	u16 limit;
	u64 base;
} __attribute__((packed));

static inline void interrupts_on(void)
{
	__asm__ volatile("sti" ::: "memory");
}

static inline void interrupts_off(void)
{
	__asm__ volatile("cli" ::: "memory");
}

/* Interrupts come on with the HLT and not before it (STI's shadow), so a wake-up cannot slip in between. */
static inline void interrupts_on_and_halt(void)
{
	__asm__ volatile("sti\n\thlt" ::: "memory");
}

static inline void pause(void)
{
	__asm__ volatile("pause");
}

#endif
