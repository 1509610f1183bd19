/*
 * pic: the masks and the edge/level registers of both 8259A hold what was written to them. Where: the port.
 */
#include "boot.h"
#include "cpu.h"
#include "ports.h"
#include "sentinel.h"


static const u16 ports[] = { PIC_MASTER_DATA, PIC_SLAVE_DATA, PIC_MASTER_ELCR, PIC_SLAVE_ELCR };
static u8 expected[ARRAY_SIZE(ports)];
static u32 next;

static bool prepare(void)
{
	return boot_info()->flags & BOOT_IRQCHIP;
}

static void begin(struct vcpu *v)
{
	(void)v;
	out8(PIC_SLAVE_ELCR, ELCR_IRQ9_TO_11);
	for (u32 i = 0; i < ARRAY_SIZE(ports); i++)
		expected[i] = in8(ports[i]);
}

static void turn(struct vcpu *v)
{
	expect(v, CHECK_PIC, expected[next], in8(ports[next]), ports[next]);
	if (ports[next] == PIC_SLAVE_DATA) {
		expected[next] ^= 1; /* IRQ 8, which nothing raises */
		out8(PIC_SLAVE_DATA, expected[next]);
	}
	if (++next == ARRAY_SIZE(ports))
		next = 0;
	count(v, CHECK_PIC);
}

const struct check check_pic = {
	.id = CHECK_PIC,
	.name = "pic",
	.flags = FIRST_CPU,
	.prepare = prepare,
	.begin = begin,
	.turn = turn,
};
