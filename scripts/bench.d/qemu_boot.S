/*
 * A 64 KiB boot ROM for QEMU that enters a vmm guest as vmm does (firmware/README.md, the boot contract): GDT, page
 * tables, boot info, command line and the image itself are in RAM already, put there by QEMU's generic loader.
 * ENTRY is defined on the command line.
 */
	.set GDT, 0x1000
	.set PAGE_TABLES, 0x9000
	.set STACK, 0x7000
	.set BOOT_INFO, 0x6000
	.set ROM, 0xffff0000
	.set EFER, 0xc0000080

	.text
	.globl _start
_start:
	.code16
real:
	lgdtl %cs:(gdtr - _start)
	mov %cr0, %eax
	or $1, %al
	mov %eax, %cr0
	ljmpl $0x08, $(ROM + protected - _start)
	.balign 4
gdtr:	.word 0x1f
	.long GDT

	.code32
protected:
	mov $0x10, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	mov $0x20, %eax			/* CR4.PAE */
	mov %eax, %cr4
	mov $PAGE_TABLES, %eax
	mov %eax, %cr3
	mov $EFER, %ecx
	rdmsr
	or $0x100, %eax			/* EFER.LME */
	wrmsr
	mov %cr0, %eax
	or $0x80000000, %eax		/* CR0.PG */
	mov %eax, %cr0
	ljmp $0x18, $(ROM + long - _start)

	.code64
long:
	mov $STACK, %esp
	mov $BOOT_INFO, %edi
	mov $ENTRY, %eax
	jmp *%rax

	.org 0xfff0
	.code16
	jmp real
	.org 0x10000
