// The kernels of the reverse sampler, for one instruction set.
#include "isa_avx512.h"
#include "kernels.h"

namespace gk {
const Kernels* kernels_avx512() { return &avx512::table; }
}  // namespace gk
