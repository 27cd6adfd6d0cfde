// Everything of the LSTM that is compiled once per instruction set: included by lstm_*.cpp after isa_*.h.
#include <math.h>
#include <stdint.h>

#include <type_traits>
#include <utility>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define GK_X86 1
#endif

#include "lstm.h"
#include "parallel.h"
#include "plan.h"

namespace gk {
namespace GK_ISA {

#include "simd.h"
#include "vector_math.h"
#include "philox.h"
#include "gemm.h"
#include "subnormals.h"
#include "lstm_products.h"
#include "lstm_engine.h"

template <class T, class Product>
void run_lstm_as(const LstmCall& call, bool backward) {
  Lstm<T, Product> lstm(call, backward);
  void* memory = acquire_workspace(lstm.lay_out(nullptr));
  lstm.lay_out(static_cast<char*>(memory));
  run_parallel(
      call.threads,
      [](void* data, int thread, int threads) {
        const FlushSubnormals flush;
        static_cast<Lstm<T, Product>*>(data)->run(thread, threads);
      },
      &lstm);
  release_workspace(memory);
}

template <class T>
void run_lstm(const LstmCall& call, bool backward) {
  if constexpr (sizeof(T) == 4) {
    if (call.bf16) return run_lstm_as<T, LowProduct>(call, backward);
  }
  run_lstm_as<T, FullProduct<T>>(call, backward);
}

extern const LstmKernels lstm_table;
const LstmKernels lstm_table = {
    [](const LstmCall& c) { run_lstm<float>(c, false); },
    [](const LstmCall& c) { run_lstm<double>(c, false); },
    [](const LstmCall& c) { run_lstm<float>(c, true); },
    [](const LstmCall& c) { run_lstm<double>(c, true); },
};

}  // namespace GK_ISA
}  // namespace gk
