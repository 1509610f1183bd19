/* Access to vector registers by number, for check_xmm.c and check_ymm.c. */
#ifndef VECTORS_H
#define VECTORS_H

/* clang-format off */
#define EACH_REGISTER(DO) \
	DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) \
	DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14) DO(15)
/* clang-format on */

#endif
