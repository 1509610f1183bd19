/*
 * ipi: every vCPU sends its neighbour (itself, if alone) an interrupt, and the next once that has arrived: none is lost, none
 * comes twice. Where: the neighbour's APIC ID. Expected, seen: interrupts sent and received.
 */
#include "boot.h"
#include "interrupt.h"
#include "sentinel.h"

static struct {
	volatile u64 received;
	u64 sent, sent_at;
	u32 looks;
} ipis[MAX_CPUS];

INTERRUPT static void on_ipi(struct interrupt_frame *frame)
{
	struct vcpu *v = this_vcpu();

	(void)frame;
	v->interrupts++;
	ipis[v->index].received++;
	lapic_eoi();
}

static bool prepare(void)
{
	interrupt_claim(VECTOR_IPI, on_ipi);
	return boot_info()->flags & BOOT_IRQCHIP;
}

static void turn(struct vcpu *v)
{
	u32 me = v->index, to;
	u64 received;

	if (results.state != GUEST_RUNNING)
		return; /* neighbours change until all vCPUs are there */
	barrier();
	to = neighbour(v)->index;
	received = ipis[to].received;
	if (received == ipis[me].sent) {
		ipis[me].sent++;
		ipis[me].sent_at = v->now;
		ipis[me].looks = 0;
		lapic_send(to, VECTOR_IPI);
		count(v, CHECK_IPI);
	} else if (received > ipis[me].sent) {
		violate(v, CHECK_IPI, ipis[me].sent, received, to);
	} else if (++ipis[me].looks > STALL_LOOKS && v->now - ipis[me].sent_at > stall_cycles) {
		violate(v, CHECK_IPI, ipis[me].sent, received, to);
	}
}

const struct check check_ipi = { .id = CHECK_IPI, .name = "ipi", .prepare = prepare, .turn = turn };
