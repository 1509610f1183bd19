/* Text into a bounded buffer, a piece at a time; what does not fit is left out. */
#ifndef FORMAT_H
#define FORMAT_H

#include "types.h"

struct text {
	u32 used;
	char bytes[252];
};

void text_char(struct text *t, char c);
void text_string(struct text *t, const char *s);
void text_decimal(struct text *t, u64 value);
/* `"name":value` */
void text_field(struct text *t, const char *name, u64 value);

#endif
