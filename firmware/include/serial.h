/* COM1 as a driver without interrupts uses it: 16 bytes into the FIFO once the transmitter is empty. */
#ifndef SERIAL_H
#define SERIAL_H

#include "types.h"

void serial_init(void);
/* Waits (bounded) until there is room, then sends. */
void serial_put(char c);
void serial_text(const char *text);
/* True if the FIFO has room for a byte; costs a port read only once in 16 bytes. */
bool serial_has_room(void);
/* Sends without looking: only after serial_has_room(). */
void serial_send(char c);
/* The next byte that the host typed, or -1. */
int serial_get(void);

#endif
