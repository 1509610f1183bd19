#include "boot.h"

#include "panic.h"

/* Set by start.S from RDI. */
const struct boot_info *boot_info_at_entry;

const struct boot_info *boot_info(void)
{
	const struct boot_info *info = boot_info_at_entry;

	if (info->magic != BOOT_MAGIC || info->version != BOOT_VERSION)
		panic(PANIC_BOOT, "no boot info of version 1");
	return info;
}

static bool ends(char c)
{
	return c == 0 || c == ' ';
}

const char *option_text(const char *name)
{
	const char *text = (const char *)boot_info()->cmdline_gpa;

	while (*text) {
		const char *n = name;

		while (*n && *text == *n)
			text++, n++;
		if (!*n && *text == '=')
			return text + 1;
		while (!ends(*text))
			text++;
		while (*text == ' ')
			text++;
	}
	return NULL;
}

u64 option_number(const char *name, u64 otherwise)
{
	const char *text = option_text(name);
	u64 number = 0;

	if (!text || *text < '0' || *text > '9')
		return otherwise;
	for (; *text >= '0' && *text <= '9'; text++)
		number = number * 10 + (u64)(*text - '0');
	switch (*text) {
	case 'G':
		return number << 30;
	case 'M':
		return number << 20;
	case 'K':
		return number << 10;
	}
	return ends(*text) ? number : otherwise;
}

bool option_lists(const char *name, const char *word)
{
	const char *text = option_text(name);

	while (text && !ends(*text)) {
		const char *w = word;

		while (*w && *text == *w)
			text++, w++;
		if (!*w && (ends(*text) || *text == ','))
			return true;
		while (!ends(*text) && *text != ',')
			text++;
		if (*text == ',')
			text++;
	}
	return false;
}

bool option_is(const char *text, const char *word)
{
	while (*word && *text == *word)
		text++, word++;
	return !*word && ends(*text);
}
