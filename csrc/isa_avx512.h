// AVX-512 F, BW, DQ, VL; compiled with the matching flags.
#define GK_ISA avx512
#define GK_VECTOR_BYTES 64
#define GK_ACCUMULATORS 24
