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
	u32 slot; /* of the next check in a list */
	bool first; /* of a list */
	struct text text;
} report;

#define BYTES_IN_A_TURN 2 /* each is an exit to the VMM */

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

static void separate(struct text *t)
{
	if (!report.first)
		text_char(t, ',');
	report.first = false;
}

static void count_field(struct text *t, const struct check_results *r)
{
	separate(t);
	text_field(t, r->name, total_count(r->id));
}

static void unavailable_name(struct text *t, const struct check_results *r)
{
	separate(t);
	text_char(t, '"');
	text_string(t, r->name);
	text_char(t, '"');
}

/* The next check in that state, from slot `report.slot` on. */
static const struct check_results *next_check(enum check_state state)
{
	while (report.slot < CHECK_SLOTS) {
		const struct check_results *r = &results.checks[report.slot++];

		if (r->id && r->state == state)
			return r;
	}
	return NULL;
}

/* One entry of a list of checks in that state; after the last, the step is over. */
static void list_step(struct text *t, enum check_state state, void (*entry)(struct text *, const struct check_results *))
{
	const struct check_results *r = next_check(state);

	if (!r) {
		report.step++;
		return;
	}
	entry(t, r);
}

static void begin_list(struct text *t, const char *opening)
{
	text_string(t, opening);
	report.first = true;
	report.slot = 0;
}

static void violation_field(struct text *t)
{
	const struct violation *violation = &results.violation;

	text_string(t, "],\"violation\":");
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

/* The next piece of the line into `t`; false after the last. */
static bool make_step(struct text *t)
{
	const struct cpu_results *cpu = &results.cpu[0];

	switch (report.step) {
	case 0:
		text_string(t, "{\"guest\":\"sentinel\",\"end\":");
		text_string(t, report.ends_guest || results.errors ? "true" : "false");
		break;
	case 1:
		next_field(t, "cpus", cpu_count);
		next_field(t, "tsc_khz", results.tsc_khz);
		break;
	case 2:
		next_field(t, "ticks", results.ticks);
		next_field(t, "rounds", results.rounds);
		break;
	case 3:
		next_field(t, "pattern_bytes", results.pattern_bytes);
		next_field(t, "errors", results.errors);
		break;
	case 4:
		next_field(t, "turns", cpu->turns);
		next_field(t, "cycles", cpu->last_tsc - cpu->first_tsc);
		break;
	case 5:
		next_field(t, "gaps", cpu->gaps_done);
		next_field(t, "gap_cycles", cpu->gap_cycles);
		break;
	case 6:
		next_field(t, "largest_gap_cycles", cpu->largest_gap_cycles);
		next_field(t, "nmis", results.nmis);
		break;
	case 7:
		begin_list(t, ",\"checks\":{");
		break;
	case 8:
		list_step(t, CHECK_ON, count_field);
		return true;
	case 9:
		begin_list(t, "},\"unavailable\":[");
		break;
	case 10:
		list_step(t, CHECK_UNAVAILABLE, unavailable_name);
		return true;
	case 11:
		violation_field(t);
		text_string(t, "}\r\n");
		break;
	default:
		return false;
	}
	report.step++;
	return true;
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
	for (u32 i = 0; i < BYTES_IN_A_TURN && report.sent < report.text.used; i++)
		if (serial_has_room())
			serial_send(report.text.bytes[report.sent++]);
	if (report.sent < report.text.used)
		return;
	report.sent = report.text.used = 0;
	if (make_step(&report.text))
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
	struct text t = { .used = 0 };

	serial_text("\r\n"); /* a report may be under way: its line is left as it is */
	report.step = 0;
	while (make_step(&t)) {
		for (u32 i = 0; i < t.used; i++)
			serial_put(t.bytes[i]);
		t.used = 0;
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
