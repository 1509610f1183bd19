#include "interrupt.h"

#include "cpu.h"
#include "panic.h"
#include "ports.h"

#define CODE_SELECTOR 0x18 /* README.md, "The boot contract" */
#define GATE_INTERRUPT 0x8e /* present, DPL 0, 64-bit interrupt gate */
#define EXCEPTIONS 32

struct gate {
	u16 offset_low, selector;
	u8 ist, type;
	u16 offset_middle;
	u32 offset_high, reserved;
};

extern const u8 msr_probe_access[], msr_try_access[], msr_fault[]; /* msr_probe.S */

static struct gate idt[256] __attribute__((aligned(16)));
static u64 nmis;
static void (*also_on_nmi)(void);

static void set_gate(u32 vector, u64 handler)
{
	idt[vector] = (struct gate){
		.offset_low = (u16)handler,
		.selector = CODE_SELECTOR,
		.type = GATE_INTERRUPT,
		.offset_middle = (u16)(handler >> 16),
		.offset_high = (u32)(handler >> 32),
	};
}

INTERRUPT static void on_nmi(struct interrupt_frame *frame)
{
	(void)frame;
	if (also_on_nmi)
		also_on_nmi();
	__atomic_fetch_add(&nmis, 1, __ATOMIC_RELAXED);
}

#define PLAIN(vector)                                                          \
	INTERRUPT static void on_exception_##vector(struct interrupt_frame *f) \
	{                                                                      \
		panic_exception(vector, 0, f->rip);                            \
	}
#define WITH_ERROR(vector)                                                                \
	INTERRUPT static void on_exception_##vector(struct interrupt_frame *f, u64 error) \
	{                                                                                 \
		panic_exception(vector, error, f->rip);                                   \
	}

PLAIN(0)
PLAIN(1)
PLAIN(3)
PLAIN(4)
PLAIN(5)
PLAIN(6)
PLAIN(7)
WITH_ERROR(8)
PLAIN(9)
WITH_ERROR(10)
WITH_ERROR(11)
WITH_ERROR(12)
WITH_ERROR(14)
PLAIN(16)
WITH_ERROR(17)
PLAIN(18)
PLAIN(19)

/* #GP: msr_probe() and msr_try() want to know; anywhere else it is the guest's end. */
INTERRUPT static void on_exception_13(struct interrupt_frame *f, u64 error)
{
	volatile u64 *rip = &f->rip;

	if (*rip != (u64)msr_probe_access && *rip != (u64)msr_try_access)
		panic_exception(13, error, *rip);
	*rip = (u64)msr_fault;
}

INTERRUPT static void on_spurious(struct interrupt_frame *frame)
{
	(void)frame;
}

#define GATE(vector) [vector] = (u64)on_exception_##vector

static void build_idt(void)
{
	const u64 handlers[EXCEPTIONS] = {
		GATE(0),  GATE(1),  [2] = (u64)on_nmi, GATE(3),  GATE(4),  GATE(5),  GATE(6),
		GATE(7),  GATE(8),  GATE(9),	       GATE(10), GATE(11), GATE(12), GATE(13),
		GATE(14), GATE(16), GATE(17),	       GATE(18), GATE(19),
	};

	for (u32 vector = 0; vector < EXCEPTIONS; vector++)
		if (handlers[vector])
			set_gate(vector, handlers[vector]);
	set_gate(VECTOR_SPURIOUS, (u64)on_spurious);
}

void interrupts_init(void)
{
	struct descriptor_pointer pointer = { sizeof idt - 1, (u64)idt };

	if (!idt[0].type)
		build_idt();
	__asm__ volatile("lidt %0" : : "m"(pointer) : "memory");
}

void interrupt_claim(u8 vector, interrupt_handler *handler)
{
	set_gate(vector, (u64)handler);
}

void nmi_claim(void (*handler)(void))
{
	also_on_nmi = handler;
}

u64 nmi_count(void)
{
	return __atomic_load_n(&nmis, __ATOMIC_RELAXED);
}

#define ICW1_INIT_WITH_ICW4 0x11
#define ICW3_MASTER_SLAVE_ON_2 0x04
#define ICW3_SLAVE_ID_2 0x02
#define ICW4_8086 0x01

void pic_init(void)
{
	out8(PIC_MASTER_COMMAND, ICW1_INIT_WITH_ICW4);
	out8(PIC_SLAVE_COMMAND, ICW1_INIT_WITH_ICW4);
	out8(PIC_MASTER_DATA, VECTOR_PIC_MASTER);
	out8(PIC_SLAVE_DATA, VECTOR_PIC_SLAVE);
	out8(PIC_MASTER_DATA, ICW3_MASTER_SLAVE_ON_2);
	out8(PIC_SLAVE_DATA, ICW3_SLAVE_ID_2);
	out8(PIC_MASTER_DATA, ICW4_8086);
	out8(PIC_SLAVE_DATA, ICW4_8086);
	out8(PIC_MASTER_DATA, 0xff);
	out8(PIC_SLAVE_DATA, 0xff);
}

void pic_unmask(u32 irq)
{
	out8(PIC_MASTER_DATA, (u8)(in8(PIC_MASTER_DATA) & ~(1u << irq)));
}

void pic_eoi(void)
{
	out8(PIC_MASTER_COMMAND, PIC_EOI);
}

#define PIT_CHANNEL0_LOHI_MODE2 0x34

u32 pit_start(u32 hz)
{
	u32 divisor = PIT_HZ / hz;

	if (divisor > 0xffff)
		divisor = 0xffff;
	out8(PIT_COMMAND, PIT_CHANNEL0_LOHI_MODE2);
	out8(PIT_CHANNEL0, (u8)divisor);
	out8(PIT_CHANNEL0, (u8)(divisor >> 8));
	return divisor;
}

#define SVR_ENABLE 0x100
#define ICR_BUSY (1u << 12)
#define ICR_POLLS 1000

void lapic_init(bool takes_pic)
{
	lapic_write(LAPIC_SVR, SVR_ENABLE | VECTOR_SPURIOUS);
	lapic_write(LAPIC_TPR, 0);
	lapic_write(LAPIC_LVT_TIMER, LVT_MASKED | VECTOR_TIMER);
	lapic_write(LAPIC_LVT_LINT0, takes_pic ? LVT_EXTINT : LVT_MASKED);
	lapic_write(LAPIC_LVT_LINT1, LVT_NMI);
	lapic_write(LAPIC_TIMER_DIVIDE, LAPIC_DIVIDE_BY_1);
}

void lapic_send(u32 apic_id, u32 icr_low)
{
	for (u32 polls = ICR_POLLS; polls && lapic_read(LAPIC_ICR_LOW) & ICR_BUSY; polls--)
		pause();
	lapic_write(LAPIC_ICR_HIGH, apic_id << 24);
	lapic_write(LAPIC_ICR_LOW, icr_low);
}
