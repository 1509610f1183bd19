/*
 * nmi: the first vCPU sends each vCPU in turn an NMI, and the next once that has arrived: none is lost. (More may come: the
 * VMM's operator can send some.) Where: the APIC ID. Expected, seen: NMIs of all vCPUs.
 */
#include "boot.h"
#include "interrupt.h"
#include "sentinel.h"

static u64 expected, sent_at;
static u32 to, looks;

static bool prepare(void)
{
	return boot_info()->flags & BOOT_IRQCHIP;
}

static void turn(struct vcpu *v)
{
	u64 arrived = nmi_count();

	if (results.state != GUEST_RUNNING)
		return;
	if (arrived >= expected) {
		to = to + 1 < cpu_count ? to + 1 : 0;
		expected = arrived + 1;
		sent_at = v->now;
		looks = 0;
		lapic_send(to, ICR_NMI);
		count(v, CHECK_NMI);
	} else if (++looks > STALL_LOOKS && v->now - sent_at > stall_cycles) {
		violate(v, CHECK_NMI, expected, arrived, to);
	}
}

const struct check check_nmi = { .id = CHECK_NMI, .name = "nmi", .flags = FIRST_CPU, .prepare = prepare, .turn = turn };
