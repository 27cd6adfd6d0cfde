// Everything that is compiled once per instruction set: included by kernels_*.cpp after they have set
// GK_ISA (namespace and name), GK_VECTOR_BYTES, GK_ACCUMULATORS and, where there are bfloat16 products, GK_BF16.
#include <math.h>
#include <stdint.h>

#include <type_traits>
#include <utility>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define GK_X86 1
#endif

#include "parallel.h"
#include "plan.h"

namespace gk {
namespace GK_ISA {

#include "simd.h"
#include "vector_math.h"
#include "philox.h"
#include "gemm.h"
#include "layers.h"
#include "engine.h"
#include "subnormals.h"

enum class Pass { Forward, Backward, Prior };

template <class T, int NV>
void run_tiled(const Call& call, Pass pass) {
  Engine<T, NV> engine(call, pass == Pass::Backward || (pass == Pass::Prior && call.wanted));
  void* memory = acquire_workspace(engine.lay_out(nullptr));
  engine.lay_out(static_cast<char*>(memory));
  struct Context {
    Engine<T, NV>* engine;
    Pass pass;
  } context{&engine, pass};
  run_parallel(
      engine.max_threads(),
      [](void* data, int thread, int threads) {
        const FlushSubnormals flush;
        Context& c = *static_cast<Context*>(data);
        if (c.pass == Pass::Forward)
          c.engine->forward_thread(thread, threads);
        else if (c.pass == Pass::Backward)
          c.engine->backward_thread(thread, threads);
        else
          c.engine->prior_thread(thread, threads);
      },
      &context);
  release_workspace(memory);
}

template <class T>
void run(const Call& call, Pass pass) {
  const int vectors = tiling(GK_VECTOR_BYTES, sizeof(T), call.samples * call.batch, call.plan->widest).vectors;
  if constexpr (sizeof(T) == 8) {
    run_tiled<T, 2>(call, pass);
  } else {
    if (vectors == 1) return run_tiled<T, 1>(call, pass);
    if (vectors == 2) return run_tiled<T, 2>(call, pass);
    run_tiled<T, 4>(call, pass);
  }
}

void normals(uint64_t seed, long rows, long cols, uint32_t step, uint32_t sample, float* out) {
  for (long r = 0; r < rows; r += kWords) {
    const int n = int(rows - r < kWords ? rows - r : kWords);
    float* tile = static_cast<float*>(acquire_workspace(sizeof(float) * cols * kWords));
    philox_normals<float>(seed, r, n, int(cols), step, sample, tile, kWords);
    transpose(tile, kWords, cols, n, out + r * cols, cols);
    release_workspace(tile);
  }
}

extern const LstmKernels lstm_table;  // lstm_kernels.h

#define GK_TEXT_(x) #x
#define GK_TEXT(x) GK_TEXT_(x)

const Kernels table = {
    GK_TEXT(GK_ISA),
    GK_VECTOR_BYTES,
#ifdef GK_BF16
    true,
#else
    false,
#endif
    [](const Call& c) { run<float>(c, Pass::Forward); },
    [](const Call& c) { run<double>(c, Pass::Forward); },
    [](const Call& c) { run<float>(c, Pass::Backward); },
    [](const Call& c) { run<double>(c, Pass::Backward); },
    [](const Call& c) { run<float>(c, Pass::Prior); },
    [](const Call& c) { run<double>(c, Pass::Prior); },
    normals,
    &lstm_table,
};

}  // namespace GK_ISA
}  // namespace gk
