#include "memory.h"

#include <cstdlib>
#include <deque>
#include <iterator>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gk {

namespace {

struct Block {
  void* data;
  size_t room;
};

std::mutex mutex;
std::deque<Block> waiting;  // oldest first
size_t waiting_bytes = 0;

constexpr size_t kHugePage = size_t(2) << 20;

}  // namespace

Memory::Memory(size_t bytes) : data_(nullptr), bytes_(bytes), room_(0) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    // The youngest that fits and wastes no more than it holds: it is the likeliest to be in the cache.
    for (auto at = waiting.rbegin(); at != waiting.rend(); ++at) {
      if (at->room < bytes || at->room / 2 > bytes) continue;
      data_ = at->data;
      room_ = at->room;
      waiting_bytes -= room_;
      waiting.erase(std::next(at).base());
      return;
    }
  }
  const size_t page = bytes >= 2 * kHugePage ? kHugePage : 64;
  room_ = (bytes + page) / page * page;
  if (posix_memalign(&data_, page, room_) != 0) throw std::bad_alloc();
#if defined(__linux__)
  if (page == kHugePage) madvise(data_, room_, MADV_HUGEPAGE);  // a wish: it may fail
#endif
}

Memory::~Memory() {
  const std::lock_guard<std::mutex> lock(mutex);
  waiting.push_back({data_, room_});
  waiting_bytes += room_;
  while (waiting_bytes > kWaitingBytes) {
    waiting_bytes -= waiting.front().room;
    std::free(waiting.front().data);
    waiting.pop_front();
  }
}

size_t release_waiting() {
  const std::lock_guard<std::mutex> lock(mutex);
  const size_t bytes = waiting_bytes;
  for (const Block& block : waiting) std::free(block.data);
  waiting.clear();
  waiting_bytes = 0;
  return bytes;
}

}  // namespace gk
