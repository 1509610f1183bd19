/* What the VMM tells a guest at entry (README.md, "The boot contract"), and the options on its command line. */
#ifndef BOOT_H
#define BOOT_H

#include "types.h"

#define BOOT_MAGIC 0x424d4d56u /* "VMMB" */
#define BOOT_VERSION 1u
#define BOOT_IRQCHIP (1u << 0)
#define BOOT_PIT (1u << 1)

struct boot_info {
	u32 magic;
	u32 version;
	u64 ram_below_4g;
	u64 ram_above_4g;
	u32 cpus;
	u32 tsc_khz;
	u32 flags;
	u32 cmdline_len;
	u64 cmdline_gpa;
};

/* The only guest code that looks at EBX/RDI's block; ends the guest with PANIC_BOOT if it is not one. */
const struct boot_info *boot_info(void);

/* The text after `name=` on the command line, up to the next space; NULL if it is not given. */
const char *option_text(const char *name);
/* The same as a number: decimal with K, M or G (powers of 1024); `otherwise` if it is not given or not a number. */
u64 option_number(const char *name, u64 otherwise);
/* Whether the option's comma-separated list holds `word`; false if the option is not given. */
bool option_lists(const char *name, const char *word);
/* Whether `text`, up to a space or its end, is `word`. */
bool option_is(const char *text, const char *word);

#endif
