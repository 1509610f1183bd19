/* Tells the VMM where the results area is (include/results.h has the same figures). */
#include "note.h"

	results_note 0x200000, 0x111000
	.section .note.GNU-stack, "", %progbits
