// Head rows in chunks and segments: what the operations over a hypernetwork's head have in common. `P` is a struct
// with rows, segments, chunk and offsets ([segments + 1], or null for one segment).
#pragma once
#include <cstdint>

#include "common/portable.h"

namespace hyperfast {

HF_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class P>
HF_INLINE int64_t chunk_count(const P& p) { return (p.rows + p.chunk - 1) / p.chunk; }

template <class P>
HF_INLINE int64_t segment_begin(const P& p, int64_t segment) { return p.offsets ? p.offsets[segment] : 0; }
template <class P>
HF_INLINE int64_t segment_end(const P& p, int64_t segment) { return p.offsets ? p.offsets[segment + 1] : p.rows; }

// The last segment that begins at or before head row `row`.
template <class P>
HF_INLINE int64_t segment_of(const P& p, int64_t row) {
  int64_t low = 0, high = p.segments - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (p.offsets[middle] <= row) low = middle; else high = middle - 1;
  }
  return low;
}

// Calls f(segment, begin, end) for each run of head rows of chunk `chunk` that shares a segment.
template <class P, class F>
HF_BODY void for_each_run(const P& p, int64_t chunk, F f) {
  const int64_t end = smaller((chunk + 1) * p.chunk, p.rows);
  for (int64_t begin = chunk * p.chunk; begin < end;) {
    const int64_t segment = p.offsets ? segment_of(p, begin) : 0;
    const int64_t stop = smaller(segment_end(p, segment), end);
    f(segment, begin, stop);
    begin = stop;
  }
}

}  // namespace hyperfast
