/*
 * ports: registers of the serial port and of the reset control hold their values. Where: the port.
 */
#include "cpu.h"
#include "ports.h"
#include "sentinel.h"

static struct place {
	u16 port;
	u8 writable; /* bits that may take any value; 0: only looked at */
	u8 expected;
} places[] = {
	{ COM1 + UART_SCR, 0xff, 0 },
	{ COM1 + UART_IER, 0, 0 },
	{ COM1 + UART_LCR, 0, 0 },
	{ COM1 + UART_MCR, 0, 0 },
	{ RESET_CONTROL, RESET_CONTROL_KEPT, 0 },
};
static u32 next;
static u64 round;

static void rewrite(struct place *p)
{
	if (!p->writable)
		return;
	p->expected = (u8)(unlike(0, p->port, ++round) >> 56) & p->writable;
	out8(p->port, p->expected);
}

static bool prepare(void)
{
	for (u32 i = 0; i < ARRAY_SIZE(places); i++) {
		rewrite(&places[i]);
		if (places[i].writable && in8(places[i].port) != places[i].expected)
			return false;
		places[i].expected = in8(places[i].port);
	}
	return true;
}

static void turn(struct vcpu *v)
{
	struct place *p = &places[next];

	expect(v, CHECK_PORTS, p->expected, in8(p->port), p->port);
	rewrite(p);
	if (++next == ARRAY_SIZE(places))
		next = 0;
	count(v, CHECK_PORTS);
}

const struct check check_ports = { .id = CHECK_PORTS, .name = "ports", .flags = FIRST_CPU, .prepare = prepare, .turn = turn };
