/* Entry of a 64-bit guest: long mode, RDI = boot info, interrupts off. Leaves the VMM's small stack for its own. */
#include "note.h"

#define STACK_SIZE 0x4000

	entry_mode_note 64

	.text
	.globl	_start
_start:
	lea	stack_top(%rip), %rsp
	mov	%rdi, boot_info_at_entry(%rip)
	xor	%ebp, %ebp
	call	main
stop:
	cli
	hlt
	jmp	stop

	.bss
	.balign	16
	.skip	STACK_SIZE
stack_top:
	.section .note.GNU-stack, "", %progbits
