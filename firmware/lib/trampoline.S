/*
 * Copied to TRAMPOLINE by smp_start(). A start-up IPI enters it in real mode with CS = TRAMPOLINE / 16; everything that the
 * first vCPU's mode consists of is read from struct trampoline_data (smp.c).
 */
#include "trampoline.h"

#define AT(label) (TRAMPOLINE + (label - trampoline))
#define DATA(offset) (TRAMPOLINE_DATA + offset)
#define CR0_PE 1
#define MSR_EFER 0xc0000080

	.section .rodata.trampoline, "a", %progbits
	.globl	trampoline, trampoline_end
	.code16
trampoline:
	cli
	cld
	xor	%eax, %eax
	mov	%ax, %ds
	lgdtl	DATA(0x30)
	mov	%cr0, %eax
	or	$CR0_PE, %eax
	mov	%eax, %cr0
	ljmpl	$0x08, $AT(protected)

	.code32
protected:
	mov	$0x10, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss
	mov	DATA(0x08), %eax
	mov	%eax, %cr4
	mov	DATA(0x10), %eax
	mov	%eax, %cr3
	mov	$MSR_EFER, %ecx
	mov	DATA(0x18), %eax
	xor	%edx, %edx
	wrmsr
	mov	DATA(0x00), %eax
	mov	%eax, %cr0
	ljmpl	$0x18, $AT(long_mode)

	.code64
long_mode:
	mov	DATA(0x20), %rsp
	mov	DATA(0x28), %rax
	xor	%ebp, %ebp
	call	*%rax
	hlt
trampoline_end:
	.section .note.GNU-stack, "", %progbits
