/* The JSON line. In normal running it is made a field at a time and sent a byte at a time, so that no turn gets long. */
#include "boot.h"
#include "cpu.h"
#include "format.h"
#include "panic.h"
#include "sentinel.h"
#include "serial.h"

bool report_active;
static u32 violated; /* set once: from then on, the vCPU that set it alone speaks */

static struct {
	bool ends_guest;
	bool end_wanted; /* asked for while another report is under way */
	u32 step;
	u32 sent; /* bytes of `text` */
	bool first_check;
	struct text text;
} report;

static const char *const check_states[] = { "off", "on", "unavailable" };

static u64 total_count(u32 id)
{
	u64 total = 0;

	for (u32 i = 0; i < cpu_count; i++)
		total += results.cpu[i].counts[id];
	return total;
}

static void next_field(struct text *t, const char *name, u64 value)
{
	text_char(t, ',');
	text_field(t, name, value);
}

static void check_field(struct text *t, const struct check_results *r)
{
	if (!r->id)
		return;
	if (!report.first_check)
		text_char(t, ',');
	report.first_check = false;
	text_char(t, '"');
	text_string(t, r->name);
	text_string(t, "\":{\"state\":\"");
	text_string(t, check_states[r->state]);
	text_char(t, '"');
	next_field(t, "count", total_count(r->id));
	next_field(t, "errors", r->errors);
	text_char(t, '}');
}

static void violation_field(struct text *t)
{
	const struct violation *violation = &results.violation;

	text_string(t, "},\"violation\":");
	if (!results.errors) {
		text_string(t, "null");
		return;
	}
	text_string(t, "{\"check\":\"");
	text_string(t, results.checks[violation->check].name);
	text_char(t, '"');
	next_field(t, "number", violation->check);
	next_field(t, "cpu", violation->cpu);
	next_field(t, "expected", violation->expected);
	next_field(t, "seen", violation->seen);
	next_field(t, "where", violation->where);
	next_field(t, "tsc", violation->tsc);
	text_char(t, '}');
}

/* One step of the line into `t`; false after the last. */
static bool make_step(struct text *t, u32 step)
{
	const struct cpu_results *cpu = &results.cpu[0];

	switch (step) {
	case 0:
		text_string(t, "{\"guest\":\"sentinel\",\"end\":");
		text_string(t, report.ends_guest || results.errors ? "true" : "false");
		return true;
	case 1:
		next_field(t, "cpus", cpu_count);
		next_field(t, "tsc_khz", results.tsc_khz);
		return true;
	case 2:
		next_field(t, "ticks", results.ticks);
		next_field(t, "rounds", results.rounds);
		return true;
	case 3:
		next_field(t, "pattern_bytes", results.pattern_bytes);
		next_field(t, "errors", results.errors);
		return true;
	case 4:
		next_field(t, "turns", cpu->turns);
		next_field(t, "cycles", cpu->last_tsc - cpu->first_tsc);
		return true;
	case 5:
		next_field(t, "gaps", cpu->gaps_done);
		next_field(t, "gap_cycles", cpu->gap_cycles);
		return true;
	case 6:
		next_field(t, "largest_gap_cycles", cpu->largest_gap_cycles);
		next_field(t, "nmis", results.nmis);
		text_string(t, ",\"checks\":{");
		report.first_check = true;
		return true;
	}
	if (step < 7 + CHECK_SLOTS) {
		check_field(t, &results.checks[step - 7]);
		return true;
	}
	if (step == 7 + CHECK_SLOTS) {
		violation_field(t);
		text_string(t, "}\r\n");
		return true;
	}
	return false;
}

void report_request(bool ends_guest)
{
	if (report_active) {
		report.end_wanted |= ends_guest;
		return;
	}
	report.step = 0;
	report.sent = report.text.used = 0;
	report.ends_guest = ends_guest;
	report_active = true;
}

/* Another vCPU is ending the guest. */
__attribute__((noreturn)) static void stand_still(void)
{
	for (;;) {
		interrupts_off();
		__asm__ volatile("hlt");
	}
}

void report_turn(void)
{
	if (*(volatile u32 *)&violated)
		stand_still();
	if (report.sent < report.text.used) {
		if (serial_has_room())
			serial_send(report.text.bytes[report.sent++]);
		return;
	}
	report.sent = report.text.used = 0;
	if (make_step(&report.text, report.step++))
		return;
	report_active = false;
	if (!report.ends_guest) {
		if (report.end_wanted)
			report_request(true);
		return;
	}
	results.state = GUEST_ENDED;
	debug_exit(0);
}

void report_at_once(void)
{
	struct text t;

	serial_text("\r\n"); /* a report may be under way: its line is left as it is */
	for (u32 step = 0, more = true; more; step++) {
		t.used = 0;
		more = make_step(&t, step);
		for (u32 i = 0; i < t.used; i++)
			serial_put(t.bytes[i]);
	}
}

void violate(struct vcpu *v, enum check_id id, u64 expected, u64 seen, u64 where)
{
	interrupts_off();
	if (__atomic_exchange_n(&violated, 1, __ATOMIC_SEQ_CST))
		stand_still();
	results.checks[id].expected = expected;
	results.checks[id].seen = seen;
	results.checks[id].where = where;
	results.checks[id].errors++;
	results.violation = (struct violation){ id, v->index, expected, seen, where, v->now };
	barrier();
	results.errors++;
	results.state = GUEST_VIOLATED;
	report_at_once();
	debug_exit(id);
}
