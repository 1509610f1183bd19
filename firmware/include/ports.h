/*
 * I/O ports and their bits. Shared by C and assembler, so preprocessor constants only.
 * Sources: PC16550D data sheet (UART), Intel 8259A and 8254 data sheets (PIC, PIT), firmware/README.md (the rest).
 */
#ifndef PORTS_H
#define PORTS_H

#define COM1 0x3f8
#define UART_THR 0
#define UART_RBR 0
#define UART_IER 1
#define UART_DLL 0 /* with LCR_DLAB */
#define UART_DLM 1
#define UART_FCR 2
#define UART_LCR 3
#define UART_MCR 4
#define UART_LSR 5
#define UART_SCR 7
#define LSR_DATA_READY 0x01
#define LSR_THR_EMPTY 0x20
#define FCR_ENABLE_AND_CLEAR 0x07
#define LCR_8N1 0x03
#define LCR_DLAB 0x80
#define MCR_DTR_RTS_OUT2 0x0b
#define UART_FIFO_DEPTH 16
#define SERIAL_POLLS 1000 /* a transmitter that never gets ready must not hang a guest */

#define DEBUG_EXIT 0xf4

#define RESET_CONTROL 0xcf9 /* Intel ICH9 data sheet, 13.7.5 RST_CNT */
#define RESET_CONTROL_KEPT 0x0a

#define PIC_MASTER_COMMAND 0x20
#define PIC_MASTER_DATA 0x21
#define PIC_SLAVE_COMMAND 0xa0
#define PIC_SLAVE_DATA 0xa1
#define PIC_EOI 0x20
#define PIC_MASTER_ELCR 0x4d0 /* edge/level control: Intel 82371 data sheet */
#define PIC_SLAVE_ELCR 0x4d1
#define ELCR_IRQ9_TO_11 0x0e

#define PIT_CHANNEL0 0x40
#define PIT_CHANNEL2 0x42
#define PIT_COMMAND 0x43
#define PIT_HZ 1193182

/* The test device (firmware/README.md). */
#define TESTDEV_STREAM 0x5f0
#define TESTDEV_POST 0x5f2
#define TESTDEV_COUNT 0x5f4

#endif
