// AVX-512 with bfloat16 dot products.
#define GK_ISA avx512_bf16
#define GK_VECTOR_BYTES 64
#define GK_ACCUMULATORS 24
#define GK_BF16 1
