/*
 * paging: a window of one page for each vCPU, above all RAM, shows the frame that its page-table entry says, before and after
 * it is remapped. Where: the window's address. Expected, seen: the frame's mark.
 */
#include "cpu.h"
#include "sentinel.h"

#define WINDOWS 0x8000000000ull /* 512 GiB: the second entry of the highest table */
#define PRESENT_WRITABLE 3ull
#define FRAMES 2

static u64 directory_pointers[512] __attribute__((aligned(4096)));
static u64 directory[512] __attribute__((aligned(4096)));
static u64 entries[512] __attribute__((aligned(4096)));
static u64 frames[FRAMES][512] __attribute__((aligned(4096)));
static u32 shown[MAX_CPUS];

static u64 entry_for(u32 frame)
{
	return (u64)frames[frame] | PRESENT_WRITABLE;
}

static u64 mark_of(u32 frame)
{
	return unlike(0, frame, 0);
}

static bool prepare(void)
{
	u64 *highest = (u64 *)(read_cr3() & ~0xfffull);

	for (u32 i = 0; i < FRAMES; i++)
		frames[i][0] = mark_of(i);
	for (u32 i = 0; i < MAX_CPUS; i++)
		entries[i] = entry_for(0);
	directory[0] = (u64)entries | PRESENT_WRITABLE;
	directory_pointers[0] = (u64)directory | PRESENT_WRITABLE;
	highest[WINDOWS >> 39] = (u64)directory_pointers | PRESENT_WRITABLE;
	return true;
}

static void turn(struct vcpu *v)
{
	u64 window = WINDOWS + (u64)v->index * PAGE_SIZE;
	u32 *frame = &shown[v->index];

	expect(v, CHECK_PAGING, mark_of(*frame), *(volatile u64 *)window, window);
	*frame ^= 1;
	*(volatile u64 *)&entries[v->index] = entry_for(*frame);
	invlpg(window);
	expect(v, CHECK_PAGING, mark_of(*frame), *(volatile u64 *)window, window);
	count(v, CHECK_PAGING);
}

const struct check check_paging = { .id = CHECK_PAGING, .name = "paging", .prepare = prepare, .turn = turn };
