#include "format.h"

void text_char(struct text *t, char c)
{
	if (t->used < sizeof t->bytes)
		t->bytes[t->used++] = c;
}

void text_string(struct text *t, const char *s)
{
	while (*s)
		text_char(t, *s++);
}

void text_decimal(struct text *t, u64 value)
{
	char digits[20]; /* 2^64 has 20 */
	u32 n = 0;

	do {
		digits[n++] = (char)('0' + value % 10);
		value /= 10;
	} while (value);
	while (n)
		text_char(t, digits[--n]);
}

void text_field(struct text *t, const char *name, u64 value)
{
	text_char(t, '"');
	text_string(t, name);
	text_string(t, "\":");
	text_decimal(t, value);
}
