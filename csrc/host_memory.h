// Large host blocks, kept for reuse.
//
// The C library returns a large block to the kernel as soon as it is freed. A head's gradient, freed and allocated
// anew in every training step, is then page-faulted and zeroed each time, which costs more than computing it. Here a
// freed block waits for the next request of its size, as device memory does in every framework.
#pragma once
#include <cstddef>

namespace hyperfast {

struct HostBlock {
  void* data;
  size_t capacity;
};

// A block of at least `bytes`, aligned to 64 bytes. Throws std::bad_alloc.
HostBlock take_host_block(size_t bytes);
void return_host_block(HostBlock block);

// Bytes that wait for reuse; releasing them returns how many there were.
size_t idle_host_bytes();
size_t release_idle_host_blocks();

}  // namespace hyperfast
