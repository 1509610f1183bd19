/*
 * control: control registers and the descriptor tables' registers. CR8 is looked at and rewritten in every turn, CR2 in its
 * own; the others stay as they were.
 * Where: 0, 2, 3, 4 or 8 for CRn, 10 GDTR, 11 IDTR, 12 the selectors of CS, SS and TR.
 */
#include "boot.h"
#include "cpu.h"
#include "sentinel.h"

#define CANONICAL 0x00007fffffffffffull

enum { GDTR = 10, IDTR = 11, SELECTORS = 12, PLACES = 13 };

static struct {
	u8 next;
	u64 round;
	u64 expected[PLACES];
} held[MAX_CPUS];

static u64 mixed(struct descriptor_pointer *pointer)
{
	return pointer->base << 16 | pointer->limit;
}

static u64 read(u32 place)
{
	struct descriptor_pointer pointer;
	u16 cs, ss, tr;

	switch (place) {
	case 0:
		return read_cr0();
	case 2:
		return read_cr2();
	case 3:
		return read_cr3();
	case 4:
		return read_cr4();
	case 8:
		return read_cr8();
	case GDTR:
		__asm__ volatile("sgdt %0" : "=m"(pointer));
		return mixed(&pointer);
	case IDTR:
		__asm__ volatile("sidt %0" : "=m"(pointer));
		return mixed(&pointer);
	case SELECTORS:
		__asm__ volatile("mov %%cs, %0" : "=r"(cs));
		__asm__ volatile("mov %%ss, %0" : "=r"(ss));
		__asm__ volatile("str %0" : "=r"(tr));
		return (u64)tr << 32 | (u32)cs << 16 | ss;
	}
	return 0;
}

/* It is the LAPIC's task priority: 0 and 1 keep off no vector from 0x20 up. Without a LAPIC nothing is kept off. */
static u64 next_cr8(u64 before)
{
	if (boot_info()->flags & BOOT_IRQCHIP)
		return before ^ 1;
	return before > 1 ? before - 1 : 15;
}

static void begin(struct vcpu *v)
{
	for (u32 place = 0; place < PLACES; place++)
		held[v->index].expected[place] = read(place);
}

static void turn_cr8(struct vcpu *v)
{
	u64 *expected = &held[v->index].expected[8];

	expect(v, CHECK_CONTROL, *expected, read_cr8(), 8);
	*expected = next_cr8(*expected);
	write_cr8(*expected);
}

static void turn(struct vcpu *v)
{
	u32 place = held[v->index].next;
	u64 *expected = &held[v->index].expected[place], *round = &held[v->index].round;

	turn_cr8(v);
	expect(v, CHECK_CONTROL, *expected, read(place), place);
	if (place == 2) {
		*expected = unlike(v->index, place, *round) & CANONICAL;
		write_cr2(*expected);
	}
	if (++held[v->index].next == PLACES) {
		held[v->index].next = 0;
		++*round;
	}
	count(v, CHECK_CONTROL);
}

const struct check check_control = {
	.id = CHECK_CONTROL,
	.name = "control",
	.begin = begin,
	.turn = turn,
};
