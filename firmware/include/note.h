/*
 * The ELF notes by which an image tells the VMM what it needs: PT_NOTE segment, section .note.vmm, owner "VMM".
 * Type 1, ENTRY_MODE: u32, the processor mode to enter in: 16, 32 or 64.
 * Type 2, RESULTS: u64 guest-physical address, u64 size in bytes of the results area (results.h).
 * For the assembler, before preprocessing only: this file is included from .S sources.
 */
#ifndef NOTE_H
#define NOTE_H

#define NOTE_ENTRY_MODE 1
#define NOTE_RESULTS 2

.macro entry_mode_note bits
	.pushsection .note.vmm, "a", %note
	.balign 4
	.long 4, 4, NOTE_ENTRY_MODE
	.asciz "VMM"
	.long \bits
	.popsection
.endm

.macro results_note address, size
	.pushsection .note.vmm, "a", %note
	.balign 4
	.long 4, 16, NOTE_RESULTS
	.asciz "VMM"
	.quad \address, \size
	.popsection
.endm

#endif
