// The kernels of the reverse sampler, for one instruction set.
#include "isa_avx2.h"
#include "kernels.h"

namespace gk {
const Kernels* kernels_avx2() { return &avx2::table; }
}  // namespace gk
