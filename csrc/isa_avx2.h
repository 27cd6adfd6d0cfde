// AVX2 and FMA; compiled with -mavx2 -mfma.
#define GK_ISA avx2
#define GK_VECTOR_BYTES 32
#define GK_ACCUMULATORS 12
