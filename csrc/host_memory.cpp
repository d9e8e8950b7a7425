#include "host_memory.h"

#include <algorithm>
#include <cstdlib>
#include <list>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hyperfast {

namespace {

constexpr size_t kPage = size_t(2) << 20;  // a huge page: fewer faults and fewer address translations

std::mutex lock;
std::list<HostBlock> idle;  // the longest idle first
size_t idle_bytes = 0, live_bytes = 0, peak_live_bytes = 0;

void release_oldest() {
  idle_bytes -= idle.front().capacity;
  std::free(idle.front().data);
  idle.pop_front();
}

// Live and idle blocks together never hold more than twice what was once live. Blocks of one training step are not
// all live at once, so with less than that a step would release what its next part, or the next step, takes again.
void trim() {
  while (!idle.empty() && live_bytes + idle_bytes > 2 * peak_live_bytes) release_oldest();
}

}  // namespace

HostBlock take_host_block(size_t bytes) {
  const size_t capacity = std::max(kPage, (bytes + kPage - 1) / kPage * kPage);
  std::lock_guard<std::mutex> guard(lock);
  auto best = idle.end();
  for (auto block = idle.begin(); block != idle.end(); ++block)
    if (block->capacity >= capacity && block->capacity <= capacity + capacity / 4 &&
        (best == idle.end() || block->capacity < best->capacity))
      best = block;
  if (best != idle.end()) {
    const HostBlock block = *best;
    idle.erase(best);
    idle_bytes -= block.capacity;
    live_bytes += block.capacity;
    return block;
  }
  live_bytes += capacity;
  peak_live_bytes = std::max(peak_live_bytes, live_bytes);
  trim();
  const HostBlock block = {std::aligned_alloc(kPage, capacity), capacity};
  if (!block.data) {
    live_bytes -= capacity;
    throw std::bad_alloc();
  }
#if defined(__linux__)
  madvise(block.data, capacity, MADV_HUGEPAGE);
#endif
  return block;
}

void return_host_block(HostBlock block) {
  std::lock_guard<std::mutex> guard(lock);
  live_bytes -= block.capacity;
  idle_bytes += block.capacity;
  idle.push_back(block);
  trim();
}

size_t idle_host_bytes() {
  std::lock_guard<std::mutex> guard(lock);
  return idle_bytes;
}

size_t release_idle_host_blocks() {
  std::lock_guard<std::mutex> guard(lock);
  const size_t released = idle_bytes;
  while (!idle.empty()) release_oldest();
  peak_live_bytes = live_bytes;
  return released;
}

}  // namespace hyperfast
