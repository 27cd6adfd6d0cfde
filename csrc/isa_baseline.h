// The instruction set that every machine of the architecture has: SSE2 on x86-64, NEON on aarch64.
#define GK_ISA baseline
#define GK_VECTOR_BYTES 16
#if defined(__aarch64__)
#define GK_ACCUMULATORS 24
#else
#define GK_ACCUMULATORS 12
#endif
