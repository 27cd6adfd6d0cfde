// Memory that outlives a call: what forward keeps for backward. Fresh pages cost the system more than the kernels that
// fill them, so blocks that are given back wait for the next call of their size.
#pragma once

#include <cstddef>

namespace gk {

// Bytes of blocks that wait; beyond it the oldest go back to the system.
constexpr size_t kWaitingBytes = size_t(256) << 20;

// A block of at least so many bytes, aligned to a cache line. Throws std::bad_alloc.
class Memory {
 public:
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_;
  size_t bytes_, room_;
};

// Gives all waiting blocks back to the system; returns their bytes.
size_t release_waiting();

}  // namespace gk
