/*
 * pattern: two words in each page of a range of RAM, verified and rewritten round after round, a page in a turn. Each round
 * has its own values and moves on by a word, so that 256 rounds have used every word. Where: guest-physical address.
 * Options: pattern= bytes (16M) or `all`; stride= bytes from page to page (4K).
 */
#include "boot.h"
#include "sentinel.h"

#define SPREAD 0x9e3779b97f4a7c15ull /* 2^64 / golden ratio: neighbours get unlike values */
#define WORD_MASK 0xff8u /* offset of a word in its page */
#define HALF_PAGE 0x800u
#define OFFSET_STEP 40 /* from page to page */
#define FOUR_GIB (4ull << 30)

/* RAM that neither the VMM nor this image uses: see the map in README.md. Ends are of the boot info. */
static struct range {
	u64 start, end;
} ranges[] = { { 0x400000, 0xe00000 }, { 0x1000000, 0 }, { FOUR_GIB, 0 } };

static u64 stride;
static u64 seed, seed_before; /* of this round and of the one before */
static u32 range;
static u64 page;
static u32 offset; /* of the word in the page, before WORD_MASK */

static u64 clip(struct range *r, u64 ram_end, u64 left)
{
	if (r->end > ram_end)
		r->end = ram_end;
	if (r->end < r->start)
		r->end = r->start;
	if (r->end - r->start > left)
		r->end = r->start + left;
	return r->end - r->start;
}

static bool prepare(void)
{
	const struct boot_info *info = boot_info();
	const char *text = option_text("pattern");
	u64 left = text && option_is(text, "all") ? ~0ull : option_number("pattern", 16 << 20), size;

	ranges[1].end = info->ram_below_4g;
	ranges[2].end = FOUR_GIB + info->ram_above_4g;
	left &= ~(u64)(PAGE_SIZE - 1);
	for (u32 i = 0; i < ARRAY_SIZE(ranges); i++) {
		size = clip(&ranges[i], i < 2 ? info->ram_below_4g : FOUR_GIB + info->ram_above_4g, left);
		left -= size;
		results.pattern_bytes += size;
	}
	stride = option_number("stride", PAGE_SIZE) & ~(u64)(PAGE_SIZE - 1);
	if (stride < PAGE_SIZE)
		stride = PAGE_SIZE;
	page = ranges[0].start;
	seed = SPREAD;
	return results.pattern_bytes;
}

static void next_round(void)
{
	range = 0;
	page = ranges[0].start;
	offset = (u32)results.rounds * 8 + 8;
	seed_before = seed;
	seed = seed * SPREAD + 1;
	results.rounds++;
}

static void next_page(void)
{
	page += stride;
	offset += OFFSET_STEP;
	while (page >= ranges[range].end) {
		if (++range == ARRAY_SIZE(ranges)) {
			next_round();
			return;
		}
		page = ranges[range].start;
	}
}

/* The word before this round's, and its other half page, where its complement is. */
static void verify(struct vcpu *v, u64 gpa)
{
	u64 value = (gpa ^ seed_before) * SPREAD;

	expect(v, CHECK_PATTERN, value, *(volatile u64 *)gpa, gpa);
	expect(v, CHECK_PATTERN, ~value, *(volatile u64 *)(gpa ^ HALF_PAGE), gpa ^ HALF_PAGE);
}

static void turn(struct vcpu *v)
{
	u64 gpa, value;

	if (results.rounds)
		verify(v, page + ((offset - 8) & WORD_MASK));
	gpa = page + (offset & WORD_MASK);
	value = (gpa ^ seed) * SPREAD;
	*(volatile u64 *)gpa = value;
	*(volatile u64 *)(gpa ^ HALF_PAGE) = ~value;
	count(v, CHECK_PATTERN);
	next_page();
}

const struct check check_pattern = {
	.id = CHECK_PATTERN,
	.name = "pattern",
	.flags = OFTEN | FIRST_CPU,
	.prepare = prepare,
	.turn = turn,
};
