/*
 * u64 registers_hold(u64 seed, u64 loops): fills the general-purpose registers with numbers made of `seed`, counts `loops` down,
 * and gives back which of them do not hold their number any more: bit n for the n-th of the list below; bit 15: the flags.
 * Interrupts stay on: what interrupts it must not change anything.
 */
	.text
	.globl	registers_hold

	.macro	all_registers operation
	\operation %rax, 0
	\operation %rbx, 1
	\operation %rdx, 2
	\operation %rsi, 3
	\operation %rdi, 4
	\operation %r8, 5
	\operation %r9, 6
	\operation %r10, 7
	\operation %r11, 8
	\operation %r12, 9
	\operation %r13, 10
	\operation %r14, 11
	\operation %r15, 12
	.endm

	.macro	fill register, number
	lea	(0x1111 * (\number + 1))(%rbp), \register
	.endm

	.macro	verify register, number
	sub	%rbp, \register
	cmp	$(0x1111 * (\number + 1)), \register
	je	1f
	bts	$\number, %ecx
1:
	.endm

registers_hold:
	push	%rbp
	push	%rbx
	push	%r12
	push	%r13
	push	%r14
	push	%r15
	mov	%rdi, %rbp
	mov	%rsi, %rcx
	all_registers fill
	stc
0:
	dec	%rcx	/* leaves the carry flag alone */
	jnz	0b
	jc	2f
	bts	$15, %ecx
2:
	all_registers verify
	mov	%rcx, %rax
	pop	%r15
	pop	%r14
	pop	%r13
	pop	%r12
	pop	%rbx
	pop	%rbp
	ret
	.section .note.GNU-stack, "", %progbits
