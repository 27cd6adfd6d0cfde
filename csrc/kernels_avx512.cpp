// AVX-512 F, BW, DQ, VL; compiled with the matching flags.
#define GK_ISA avx512
#define GK_VECTOR_BYTES 64
#define GK_ACCUMULATORS 24
#include "kernels.h"

namespace gk {
const Kernels* kernels_avx512() { return &avx512::table; }
}  // namespace gk
