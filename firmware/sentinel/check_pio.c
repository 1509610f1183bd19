/*
 * pio: string I/O on the test device's stream, in chunks that take several exits: no byte is lost, doubled or out of order.
 * Where: 0 a byte read, 1 the count of bytes written, 2 their sum.
 */
#include "cpu.h"
#include "sentinel.h"
#include "testdev.h"

#define CHUNK 3
#define TURNS_BETWEEN_SUMS 16

static u8 buffer[CHUNK];
static u8 value; /* of the next byte written */
static u32 written, sum, next_read, turns;

static void write_chunk(void)
{
	const u8 *from = buffer;
	u64 size = CHUNK;

	for (u32 i = 0; i < CHUNK; i++) {
		buffer[i] = value += 7;
		sum = testdev_sum(sum, value);
	}
	written += CHUNK;
	__asm__ volatile("rep outsb" : "+S"(from), "+c"(size) : "d"(TESTDEV_STREAM) : "memory");
}

static void read_chunk(struct vcpu *v)
{
	u8 *to = buffer;
	u64 size = CHUNK;

	__asm__ volatile("rep insb" : "+D"(to), "+c"(size) : "d"(TESTDEV_STREAM) : "memory");
	for (u32 i = 0; i < CHUNK; i++)
		expect(v, CHECK_PIO, next_read++ & 0xff, buffer[i], 0);
}

static void verify_sums(struct vcpu *v)
{
	expect(v, CHECK_PIO, written, in32(TESTDEV_COUNT), 1);
	expect(v, CHECK_PIO, sum, testdev_read(TESTDEV_STREAM_SUM), 2);
}

static bool prepare(void)
{
	if (!testdev_present())
		return false;
	out32(TESTDEV_COUNT, 0);
	return true;
}

static void turn(struct vcpu *v)
{
	if (++turns % TURNS_BETWEEN_SUMS == 0)
		verify_sums(v);
	else if (turns & 1)
		write_chunk();
	else
		read_chunk(v);
	count(v, CHECK_PIO);
}

const struct check check_pio = { .id = CHECK_PIO, .name = "pio", .flags = FIRST_CPU, .prepare = prepare, .turn = turn };
