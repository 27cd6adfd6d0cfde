#include "parallel.h"

#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define GK_PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define GK_PAUSE() asm volatile("yield")
#else
#define GK_PAUSE() ((void)0)
#endif

namespace gk {

namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpGet = int (*)();

GompParallel gomp_parallel = nullptr;
OmpGet omp_thread = nullptr, omp_threads = nullptr;

struct Task {
  void (*body)(void*, int, int);
  void* context;
};

void gomp_body(void* data) {
  const Task* task = static_cast<Task*>(data);
  task->body(task->context, omp_thread(), omp_threads());
}

}  // namespace

void use_openmp(void* parallel, void* thread, void* threads) {
  gomp_parallel = reinterpret_cast<GompParallel>(parallel);
  omp_thread = reinterpret_cast<OmpGet>(thread);
  omp_threads = reinterpret_cast<OmpGet>(threads);
}

bool uses_openmp() { return gomp_parallel && omp_thread && omp_threads; }

void run_parallel(int threads, void (*body)(void*, int, int), void* context) {
  if (threads <= 1) {
    body(context, 0, 1);
    return;
  }
  if (uses_openmp()) {
    Task task{body, context};
    gomp_parallel(gomp_body, &task, unsigned(threads), 0);
    return;
  }
  // No OpenMP runtime to share (macOS, Windows): threads of this call alone, gone when it ends, so that none of them
  // can compete with torch's between calls. Tens of microseconds, against a pool's few.
  std::vector<std::thread> team;
  team.reserve(threads - 1);
  for (int i = 1; i < threads; ++i) team.emplace_back(body, context, i, threads);
  body(context, 0, threads);
  for (auto& thread : team) thread.join();
}

void Barrier::wait(int threads) {
  if (threads == 1) return;
  const int phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
    if (spins < 4000)
      GK_PAUSE();
    else
      std::this_thread::yield();
  }
}

}  // namespace gk
