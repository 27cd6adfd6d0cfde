#include "dispatch.h"

#include <stdexcept>

namespace gk {

namespace {

struct Entry {
  const Kernels* kernels;
  bool usable;
};

std::vector<Entry> entries() {
#ifdef GK_ONLY  // built for one instruction set: setup.py
  return {{GK_ONLY(), true}};
#else
  std::vector<Entry> found{{kernels_baseline(), true}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // What a compiler could not compile is left out: setup.py.
#ifndef GK_WITHOUT_AVX2
  found.push_back({kernels_avx2(), avx2});
#endif
#ifndef GK_WITHOUT_AVX512
  found.push_back({kernels_avx512(), avx512});
#endif
#ifndef GK_WITHOUT_AVX512_BF16
  found.push_back({kernels_avx512_bf16(), avx512 && __builtin_cpu_supports("avx512bf16")});
#endif
#endif
  return found;
#endif
}

}  // namespace

std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets;
  for (const Entry& entry : entries()) sets.push_back({entry.kernels->name, entry.usable});
  return sets;
}

const Kernels& kernels_named(const std::string& name) {
  const Kernels* chosen = nullptr;
  std::string usable;
  for (const Entry& entry : entries()) {
    if (!entry.usable) continue;
    usable += (usable.empty() ? "" : ", ") + std::string(entry.kernels->name);
    if (name.empty() || name == entry.kernels->name) chosen = entry.kernels;
  }
  if (!chosen) throw std::invalid_argument("instruction set '" + name + "' cannot run here; usable: " + usable);
  return *chosen;
}

}  // namespace gk
