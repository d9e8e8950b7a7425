// Weight generation, written once over a Block (see group.h in cpu/ and cuda/).
//
// The head rows are cut into chunks. A chunk computes the trunk for the condition rows it needs (a few thousand
// multiplications), then streams its rows of the head once. In the backward pass it leaves its share of dh in the
// workspace; `generate_finish` adds the shares in a fixed order and walks back through the trunk.
#pragma once
#include <cmath>

#include "common/portable.h"
#include "common/segments.h"
#include "hyperfast/generate.h"

namespace hyperfast {

HF_INLINE int64_t encoded_width(const GenerateParams& p) {
  return p.encoding == Encoding::kNone ? p.condition_size : 2 * p.condition_size;
}

// Width of the input of trunk layer `layer`; for `layers` itself, the head's.
HF_INLINE int64_t input_width(const GenerateParams& p, int layer) {
  return layer == 0 ? encoded_width(p) : p.widths[layer - 1];
}

// Scratch is laid out in cache lines: a vector that straddles two costs several times as much to write and read back.
HF_INLINE int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

// Accumulators that one condition row's trunk occupies: the encoding, then pre-activation and activation per layer.
HF_INLINE int64_t trunk_floats(const GenerateParams& p) {
  int64_t total = padded(encoded_width(p));
  for (int layer = 0; layer < p.layers; ++layer) total += 2 * padded(p.widths[layer]);
  return total;
}

template <class A>
HF_BODY A activate(A x, const GenerateParams& p) {
  switch (p.activation) {
    case Activation::kLeakyRelu: return x > 0 ? x : x * A(p.negative_slope);
    case Activation::kRelu: return x > 0 ? x : A(0);
    case Activation::kGelu: return A(0.5) * x * (1 + std::erf(x * A(0.70710678118654752440)));
    default: return std::tanh(x);
  }
}

template <class A>
HF_BODY A activation_slope(A x, const GenerateParams& p) {
  switch (p.activation) {
    case Activation::kLeakyRelu: return x > 0 ? A(1) : A(p.negative_slope);
    case Activation::kRelu: return x > 0 ? A(1) : A(0);
    case Activation::kGelu:
      return A(0.5) * (1 + std::erf(x * A(0.70710678118654752440))) +
             x * std::exp(A(-0.5) * x * x) * A(0.39894228040143267794);
    default: {
      const A t = std::tanh(x);
      return 1 - t * t;
    }
  }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

constexpr double kHalfPi = 1.57079632679489661923;

// Cosine and sine of a quarter turn times z.
template <class A>
HF_BODY A quarter_cosine(A z) {
#ifdef __CUDA_ARCH__
  return cospif(z / 2);  // without the slow path that cosf needs for large arguments
#else
  return std::cos(z * A(kHalfPi));
#endif
}
template <class A>
HF_BODY A quarter_sine(A z) {
#ifdef __CUDA_ARCH__
  return sinpif(z / 2);
#else
  return std::sin(z * A(kHalfPi));
#endif
}

// Encoding, pre-activations and activations of `count` condition rows `row(r)`, [count, trunk_floats] in `out`.
// Returns where the features h of the first row begin; the rows are trunk_floats apart.
template <class T, class Block, class RowOf>
HF_BODY int64_t trunk_forward(Block& block, const GenerateParams& p, typename Block::Acc* out, int64_t count,
                                RowOf row) {
  using A = typename Block::Acc;
  const int64_t size = p.condition_size, stride = trunk_floats(p);
  block.for_each(count * size, [&](int64_t k) {
    const int64_t r = k / size, d = k % size;
    const A z = A(static_cast<const T*>(p.condition)[row(r) * size + d]);
    A* encoded = out + r * stride + d;
    switch (p.encoding) {
      case Encoding::kCosSin:
        encoded[0] = quarter_cosine(z);
        encoded[size] = quarter_sine(z);
        break;
      case Encoding::kComplement:
        encoded[0] = z;
        encoded[size] = 1 - z;
        break;
      default: encoded[0] = z;
    }
  });
  block.sync();
  int64_t input = 0;
  for (int layer = 0; layer < p.layers; ++layer) {
    const int64_t in = input_width(p, layer), width = p.widths[layer];
    const int64_t z = input + padded(in), next = z + padded(width);
    const T* weight = static_cast<const T*>(p.weight[layer]);
    const T* bias = static_cast<const T*>(p.bias[layer]);
    block.partition(0, count * width, [&](int64_t k, auto& lanes) {
      const int64_t r = k / width, j = k % width;
      const A* x = out + r * stride + input;
      const A sum = lanes.sum(in, [&](auto i) { return lanes.load(weight + j * in, i) * lanes.load(x, i); });
      lanes.once([&] {
        out[r * stride + z + j] = sum + A(bias[j]);
        out[r * stride + next + j] = activate(sum + A(bias[j]), p);
      });
    });
    block.sync();
    input = next;
  }
  return input;
}

// Where chunk c leaves its share of dh of segment s: the overlapping pairs (c, s) form a staircase, so c + s is unique.
HF_INLINE int64_t share_index(const GenerateParams& p, int64_t chunk, int64_t segment) {
  return (chunk + segment) * p.batch * p.hidden;
}

// Calls f(rows, row, lanes) with rows a compile-time count, covering [begin, end) on the block's lane groups. Several
// rows at once are several independent loads in flight on a GPU; the processor's prefetcher wants them one by one.
template <class Block, class F>
HF_BODY void for_each_rows(Block& block, int64_t begin, int64_t end, F f) {
  constexpr int kRowsAtOnce = Block::kRowsAtOnce;
  const int64_t groups = (end - begin) / kRowsAtOnce, rest = begin + groups * kRowsAtOnce;
  block.partition(0, groups, [&](int64_t k, auto& lanes) { f(Count<kRowsAtOnce>{}, begin + k * kRowsAtOnce, lanes); });
  block.partition(rest, end, [&](int64_t row, auto& lanes) { f(Count<1>{}, row, lanes); });
}

// theta of one chunk. `scratch`: batch * trunk_floats accumulators.
template <class T, class Block>
HF_BODY void generate_chunk(Block& block, const GenerateParams& p, int64_t chunk, typename Block::Acc* scratch) {
  using A = typename Block::Acc;
  const T* head = static_cast<const T*>(p.head);
  const T* theta0 = static_cast<const T*>(p.theta0);
  T* theta = static_cast<T*>(p.theta);
  const int64_t stride = trunk_floats(p), hidden = p.hidden, total_rows = p.rows;
  for_each_run(p, chunk, [&](int64_t segment, int64_t begin, int64_t end) {
    const int64_t features =
        trunk_forward<T>(block, p, scratch, p.batch, [&](int64_t b) { return b * p.segments + segment; });
    for_each_rows(block, begin, end, [&](auto rows, int64_t row, auto& lanes) {
      for (int64_t b = 0; b < p.batch; ++b) {
        const A* h = scratch + b * stride + features;
        A sums[rows.value];
        lanes.sums(hidden, sums, [&](int r, auto i) { return lanes.load_in_order(head + (row + r) * hidden, i) * lanes.load(h, i); });
        lanes.once([&] {
          HF_UNROLL
          for (int r = 0; r < rows.value; ++r) theta[b * total_rows + row + r] = T(A(theta0[row + r]) + sums[r]);
        });
      }
    });
    block.sync();
  });
}

// The head's gradient, if it is wanted, and this chunk's share of dh, in one pass over its rows of the head.
// `scratch`: batch * trunk_floats, then batch * hidden per lane group.
template <class T, class Block>
HF_BODY void generate_backward_chunk(Block& block, const GenerateParams& p, int64_t chunk,
                                     typename Block::Acc* scratch) {
  using A = typename Block::Acc;
  const T* head = static_cast<const T*>(p.head);
  const T* grad = static_cast<const T*>(p.grad);
  T* d_head = static_cast<T*>(p.d_head);
  const int64_t stride = trunk_floats(p), hidden = p.hidden, batch = p.batch, size = batch * hidden;
  A* shares = scratch + batch * stride;
  for_each_run(p, chunk, [&](int64_t segment, int64_t begin, int64_t end) {
    const int64_t features =
        trunk_forward<T>(block, p, scratch, batch, [&](int64_t b) { return b * p.segments + segment; });
    block.for_each(block.lane_groups() * size, [&](int64_t k) { shares[k] = 0; });
    block.sync();
    for_each_rows(block, begin, end, [&](auto rows, int64_t row, auto& lanes) {
      constexpr int kRows = rows.value;
      A* share = shares + lanes.index() * size;
      lanes.for_each(hidden, [&](auto i) {
        decltype(lanes.zero(i)) weight[kRows], gradient[kRows];
        HF_UNROLL
        for (int r = 0; r < kRows; ++r) {
          weight[r] = lanes.load_in_order(head + (row + r) * hidden, i);
          gradient[r] = lanes.zero(i);
        }
        for (int64_t b = 0; b < batch; ++b) {
          const auto h = lanes.load(scratch + b * stride + features, i);
          auto sum = lanes.load(share + b * hidden, i);
          HF_UNROLL
          for (int r = 0; r < kRows; ++r) {
            const A g = A(grad[b * p.rows + row + r]);
            gradient[r] += h * g;
            sum += weight[r] * g;
          }
          lanes.store(share + b * hidden, i, sum);
        }
        if (!d_head) return;
        HF_UNROLL
        for (int r = 0; r < kRows; ++r) lanes.stream(d_head + (row + r) * hidden, i, gradient[r]);
      });
    });
    block.sync();
    A* out = static_cast<A*>(p.workspace) + share_index(p, chunk, segment);
    block.for_each(size, [&](int64_t k) {
      A sum = 0;
      for (int64_t group = 0; group < block.lane_groups(); ++group) sum += shares[group * size + k];
      out[k] = sum;
    });
    block.sync();
  });
}

// dh of every condition row from the chunks' shares, then back through trunk and encoding. One block.
template <class T, class Block>
HF_BODY void generate_finish(Block& block, const GenerateParams& p) {
  using A = typename Block::Acc;
  const int64_t count = p.batch * p.segments, stride = trunk_floats(p), chunks = chunk_count(p);
  const A* shares = static_cast<const A*>(p.workspace);
  A* activations = static_cast<A*>(p.workspace) + (chunks + p.segments) * p.batch * p.hidden;
  int64_t input = trunk_forward<T>(block, p, activations, count, [](int64_t r) { return r; });

  // Gradients take the place of the activations they belong to, from the features backwards.
  block.for_each(count * p.hidden, [&](int64_t k) {
    const int64_t r = k / p.hidden, i = k % p.hidden, b = r / p.segments, segment = r % p.segments;
    const int64_t begin = segment_begin(p, segment), end = segment_end(p, segment);
    A sum = 0;
    if (begin < end)
      for (int64_t chunk = begin / p.chunk; chunk <= (end - 1) / p.chunk; ++chunk)
        sum += shares[share_index(p, chunk, segment) + b * p.hidden + i];
    activations[r * stride + input + i] = sum;
  });
  block.sync();

  T* d_weight = static_cast<T*>(p.d_trunk);
  for (int layer = 0; layer < p.layers; ++layer) d_weight += (input_width(p, layer) + 1) * p.widths[layer];
  for (int layer = p.layers - 1; layer >= 0; --layer) {
    const int64_t in = input_width(p, layer), width = p.widths[layer];
    const int64_t z = input - padded(width), x = z - padded(in);
    d_weight -= (in + 1) * width;
    block.for_each(count * width, [&](int64_t k) {
      A* row = activations + (k / width) * stride;
      row[z + k % width] = row[input + k % width] * activation_slope(row[z + k % width], p);
    });
    block.sync();
    block.partition(0, width, [&](int64_t j, auto& lanes) {
      lanes.for_each(in, [&](auto i) {
        auto sum = lanes.zero(i);
        for (int64_t r = 0; r < count; ++r)
          sum += lanes.load(activations + r * stride + x, i) * activations[r * stride + z + j];
        lanes.store(d_weight + j * in, i, sum);
      });
      lanes.once([&] {
        A sum = 0;
        for (int64_t r = 0; r < count; ++r) sum += activations[r * stride + z + j];
        d_weight[width * in + j] = T(sum);
      });
    });
    block.sync();
    const T* weight = static_cast<const T*>(p.weight[layer]);
    block.partition(0, count, [&](int64_t r, auto& lanes) {
      lanes.for_each(in, [&](auto i) {
        auto sum = lanes.zero(i);
        for (int64_t j = 0; j < width; ++j) sum += lanes.load(weight + j * in, i) * activations[r * stride + z + j];
        lanes.store(activations + r * stride + x, i, sum);
      });
    });
    block.sync();
    input = x;
  }

  const int64_t size = p.condition_size;
  block.for_each(count * size, [&](int64_t k) {
    const int64_t r = k / size, d = k % size;
    const A* gradient = activations + r * stride + d;
    const A z = A(static_cast<const T*>(p.condition)[k]);
    A result = gradient[0];
    if (p.encoding == Encoding::kCosSin)
      result = A(kHalfPi) * (gradient[size] * quarter_cosine(z) - gradient[0] * quarter_sine(z));
    if (p.encoding == Encoding::kComplement) result = gradient[0] - gradient[size];
    static_cast<T*>(p.d_condition)[k] = T(result);
  });
}

// Accumulators of scratch for the backward pass: the shares of dh, then the activations of every condition row.
inline int64_t generate_workspace_size(const GenerateParams& p) {
  return (chunk_count(p) + p.segments) * p.batch * p.hidden + p.batch * p.segments * trunk_floats(p);
}

}  // namespace hyperfast
