/*
 * The IDT and the in-kernel interrupt controllers: PIC, PIT, LAPIC.
 * Sources: AMD64 APM volume 2 chapters 8 and 16; Intel 8259A and 8254 data sheets.
 */
#ifndef INTERRUPT_H
#define INTERRUPT_H

#include "types.h"

struct interrupt_frame {
	u64 rip, cs, rflags, rsp, ss;
};

#define INTERRUPT __attribute__((interrupt))
typedef void interrupt_handler(struct interrupt_frame *frame);

#define VECTOR_PIC_MASTER 0x20 /* IRQ 0 to 7 */
#define VECTOR_PIC_SLAVE 0x28 /* IRQ 8 to 15 */
#define VECTOR_TIMER 0x40 /* LAPIC timer */
#define VECTOR_IPI 0x41
#define VECTOR_SHADOW 0x42 /* what a vCPU sends itself, in check_shadow.c */
#define VECTOR_SPURIOUS 0xff

/* Loads the IDT on this vCPU. On the first call: every exception ends the guest, NMIs are counted, nothing else is claimed. */
void interrupts_init(void);
/* Of an exception too; before interrupts are on. `nmi_claim`: is called by each NMI. */
void interrupt_claim(u8 vector, interrupt_handler *handler);
void nmi_claim(void (*handler)(void));
/* Read and write an MSR; false if the machine has not got it, or does not take the value. After interrupts_init(). */
bool msr_probe(u32 msr, u64 *value);
bool msr_try(u32 msr, u64 value);
/* NMIs that this guest has had, on all vCPUs. */
u64 nmi_count(void);

/* Programs both 8259A: vectors as above, every IRQ masked. */
void pic_init(void);
void pic_unmask(u32 irq);
/* End of interrupt for IRQ 0 to 7. */
void pic_eoi(void);

/* Channel 0 in mode 2 (rate generator) at about `hz` (19 to PIT_HZ); gives back its divisor. */
u32 pit_start(u32 hz);

#define LAPIC_ID 0x20
#define LAPIC_VERSION 0x30
#define LAPIC_TPR 0x80
#define LAPIC_EOI 0xb0
#define LAPIC_LDR 0xd0
#define LAPIC_DFR 0xe0
#define LAPIC_SVR 0xf0
#define LAPIC_IRR 0x200 /* eight registers, 0x10 apart */
#define LAPIC_ICR_LOW 0x300
#define LAPIC_ICR_HIGH 0x310
#define LAPIC_LVT_TIMER 0x320
#define LAPIC_LVT_LINT0 0x350
#define LAPIC_LVT_LINT1 0x360
#define LAPIC_LVT_ERROR 0x370
#define LAPIC_TIMER_INITIAL 0x380
#define LAPIC_TIMER_CURRENT 0x390
#define LAPIC_TIMER_DIVIDE 0x3e0

#define ICR_NMI (4u << 8)
#define ICR_SELF (1u << 18) /* whatever the destination says */
#define LVT_MASKED (1u << 16)
#define LVT_EXTINT 0x700u
#define LVT_NMI 0x400u
#define LVT_TIMER_ONESHOT 0u
#define LVT_TIMER_PERIODIC (1u << 17)
#define LVT_TIMER_TSC_DEADLINE (2u << 17)
#define LAPIC_DIVIDE_BY_1 0xbu

#define LAPIC ((volatile u8 *)0xfee00000)

static inline u32 lapic_read(u32 reg)
{
	return *(volatile u32 *)(LAPIC + reg);
}

static inline void lapic_write(u32 reg, u32 value)
{
	*(volatile u32 *)(LAPIC + reg) = value;
}

static inline void lapic_eoi(void)
{
	lapic_write(LAPIC_EOI, 0);
}

/* Enables this vCPU's LAPIC in xAPIC mode; `takes_pic`: LINT0 brings the PIC's interrupts (the first vCPU's does). */
void lapic_init(bool takes_pic);
/* Writes the ICR for the vCPU with that APIC ID, once it is idle (bounded): a vector alone is a fixed interrupt. */
void lapic_send(u32 apic_id, u32 icr_low);

#endif
