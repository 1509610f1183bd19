#include "serial.h"

#include "cpu.h"
#include "ports.h"

static u32 room; /* bytes that the transmit FIFO still takes */

void serial_init(void)
{
	out8(COM1 + UART_IER, 0);
	out8(COM1 + UART_LCR, LCR_DLAB | LCR_8N1);
	out8(COM1 + UART_DLL, 1); /* 115200 baud */
	out8(COM1 + UART_DLM, 0);
	out8(COM1 + UART_LCR, LCR_8N1);
	out8(COM1 + UART_FCR, FCR_ENABLE_AND_CLEAR);
	out8(COM1 + UART_MCR, MCR_DTR_RTS_OUT2);
	room = 0;
}

bool serial_has_room(void)
{
	if (!room && in8(COM1 + UART_LSR) & LSR_THR_EMPTY)
		room = UART_FIFO_DEPTH;
	return room;
}

void serial_send(char c)
{
	out8(COM1 + UART_THR, (u8)c);
	room--;
}

void serial_put(char c)
{
	for (u32 polls = SERIAL_POLLS; !serial_has_room(); polls--) {
		if (!polls) {
			room = 1;
			break;
		}
		pause();
	}
	serial_send(c);
}

void serial_text(const char *text)
{
	while (*text)
		serial_put(*text++);
}

int serial_get(void)
{
	if (!(in8(COM1 + UART_LSR) & LSR_DATA_READY))
		return -1;
	return in8(COM1 + UART_RBR);
}
