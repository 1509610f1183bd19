/*
 * Access to an MSR that the machine may not have, or not let have that value:
 * bool msr_probe(u32 msr, u64 *value) reads, bool msr_try(u32 msr, u64 value) writes; false after #GP.
 * The #GP handler (interrupt.c) knows the instructions' addresses and goes on at msr_fault.
 */
	.text
	.globl	msr_probe, msr_probe_access, msr_try, msr_try_access, msr_fault
msr_probe:
	mov	%edi, %ecx
msr_probe_access:
	rdmsr
	shl	$32, %rdx
	mov	%eax, %eax
	or	%rdx, %rax
	mov	%rax, (%rsi)
	mov	$1, %eax
	ret
msr_try:
	mov	%edi, %ecx
	mov	%esi, %eax
	mov	%rsi, %rdx
	shr	$32, %rdx
msr_try_access:
	wrmsr
	mov	$1, %eax
	ret
msr_fault:
	xor	%eax, %eax
	ret
	.section .note.GNU-stack, "", %progbits
