// The kernels of the reverse sampler, for one instruction set.
#include "isa_baseline.h"
#include "kernels.h"

namespace gk {
const Kernels* kernels_baseline() { return &baseline::table; }
}  // namespace gk
