/* Fixed-width types and the few constants that every file uses. */
#ifndef TYPES_H
#define TYPES_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char s8;
typedef _Bool bool;

#define true 1
#define false 0
#define NULL ((void *)0)
#define PAGE_SIZE 4096u
#define MAX_CPUS 64u
#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))

/* Order between memory accesses as the program says; x86 keeps the order of stores, so the compiler alone must be held. */
#define barrier() __asm__ volatile("" ::: "memory")

#endif
