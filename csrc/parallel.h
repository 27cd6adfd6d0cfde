// Threads: torch's own OpenMP team where the process has one, so that no second pool competes with it.
#pragma once

#include <atomic>

namespace gk {

// Run body(context, thread, threads) on up to `threads` threads, the calling one among them, and wait for all.
// `threads` in the body is the size of the team that was really formed.
void run_parallel(int threads, void (*body)(void* context, int thread, int threads), void* context);

// Hand over the entry points of the OpenMP runtime that torch has loaded (addresses, 0 if absent).
void use_openmp(void* gomp_parallel, void* omp_get_thread_num, void* omp_get_num_threads);
bool uses_openmp();

// A barrier for the threads of one team. Spins briefly, since the waits are microseconds, then yields.
class Barrier {
 public:
  void wait(int threads);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

}  // namespace gk
