/*
 * hello: the smallest proof that a host's KVM works. One line on COM1, then exit code 0 through debug-exit.
 * Built three times, with MODE 16, 32 and 64: the same instructions are assembled for each processor mode.
 * Entered as firmware/README.md says (interrupts off, flat data segments, direction flag clear). Uses no stack.
 */
#include "note.h"
#include "ports.h"

#if MODE == 16
#define MODE_NAME "real mode"
	.code16
#elif MODE == 32
#define MODE_NAME "protected mode"
	.code32
#else
#define MODE_NAME "long mode"
	.code64
#endif

	entry_mode_note MODE

	.text
	.globl _start
_start:
	mov	$message, %esi
next:
	lodsb
	test	%al, %al
	jz	end
	mov	%al, %bl
	mov	$SERIAL_POLLS, %ecx
wait:
	mov	$COM1 + UART_LSR, %dx
	in	%dx, %al
	test	$LSR_THR_EMPTY, %al
	jnz	send
	dec	%ecx
	jnz	wait
send:
	mov	$COM1 + UART_THR, %dx
	mov	%bl, %al
	out	%al, %dx
	jmp	next
end:
	out	%al, $DEBUG_EXIT	/* %al is 0: process status 1 */
stop:
	hlt
	jmp	stop

	.section .rodata
message:
	.ascii	"hello from ", MODE_NAME
	.asciz	"\r\n"
	.section .note.GNU-stack, "", %progbits
