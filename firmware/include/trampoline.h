/* Where a starting vCPU finds its way from real to long mode. For C and assembler. */
#ifndef TRAMPOLINE_H
#define TRAMPOLINE_H

#define TRAMPOLINE 0x8000 /* page 8: the vector of the start-up IPI */
#define TRAMPOLINE_DATA 0x8f00 /* struct trampoline_data */

#endif
