// The kernels of the reverse sampler, for one instruction set.
#include "isa_avx512_bf16.h"
#include "kernels.h"

namespace gk {
const Kernels* kernels_avx512_bf16() { return &avx512_bf16::table; }
}  // namespace gk
