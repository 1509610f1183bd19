/*
 * ioapic: the redirection entries of the I/O APIC hold what was written to them; all are masked. Where: the register.
 * Source: Intel 82093AA data sheet.
 */
#include "boot.h"
#include "sentinel.h"

#define IOAPIC 0xfec00000u
#define SELECT 0x00
#define WINDOW 0x10
#define ENTRY0 0x10 /* two registers for each pin */
#define FIRST_PIN 5 /* below are those that a later guest might use */
#define PINS 24
#define MASKED (1u << 16)
#define VECTOR_AND_MODE 0xa8ffu /* trigger, polarity, destination mode; delivery mode stays fixed */
#define DESTINATION 0xff000000u

static u32 expected[PINS][2];
static u32 pin = FIRST_PIN, half;
static u64 round;

static u32 access(u32 reg, const u32 *value)
{
	volatile u32 *window = (volatile u32 *)(u64)(IOAPIC + WINDOW);

	*(volatile u32 *)(u64)(IOAPIC + SELECT) = reg;
	if (value)
		*window = *value;
	return *window;
}

static u32 fresh(void)
{
	u32 value = (u32)(unlike(0, pin * 2 + half, round) >> 32);

	return half ? value & DESTINATION : (value & VECTOR_AND_MODE) | MASKED;
}

static bool prepare(void)
{
	return boot_info()->flags & BOOT_IRQCHIP;
}

static void turn(struct vcpu *v)
{
	u32 reg = ENTRY0 + 2 * pin + half, value = fresh();

	if (round)
		expect(v, CHECK_IOAPIC, expected[pin][half], access(reg, NULL), reg);
	expected[pin][half] = access(reg, &value);
	half ^= 1;
	if (!half && ++pin == PINS) {
		pin = FIRST_PIN;
		round++;
	}
	count(v, CHECK_IOAPIC);
}

const struct check check_ioapic = {
	.id = CHECK_IOAPIC,
	.name = "ioapic",
	.flags = FIRST_CPU,
	.prepare = prepare,
	.turn = turn,
};
