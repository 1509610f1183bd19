/* Starting the other vCPUs: INIT and start-up IPIs through the LAPIC (Intel SDM volume 3, 9.4 "Multiple-processor initialization"). */
#ifndef SMP_H
#define SMP_H

#include "types.h"

/*
 * Starts the vCPU with that APIC ID in long mode, on the caller's page tables and GDT, in `entry(argument)`, which must not
 * return. False if it did not come within ten seconds. From one vCPU, one at a time.
 */
bool smp_start(u32 apic_id, void (*entry)(void *argument), void *argument, void *stack_top, u32 tsc_khz);

#endif
