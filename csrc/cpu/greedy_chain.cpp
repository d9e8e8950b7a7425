// Every step of a chain reads all vectors that are not in it yet, which is all the time it takes: they lie in tiles of
// 32 vectors, dimension by dimension, and the tiles are packed anew whenever an eighth of their slots is empty. An
// empty slot holds a NaN, which is larger than nothing. Packing keeps the order of the slots, so that of equally
// similar vectors the first slot is the one of lowest index.
#include "hyperfast/greedy_chain.h"

#include <limits>

#include "cpu/group.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

namespace {

constexpr int kLanes = 8, kGroups = 4, kTile = kLanes * kGroups;
// A step of less than this many numbers is not worth a barrier: such chains run one per thread.
constexpr int64_t kTeamNumbers = 1 << 16;

using Doubles = Vector<double, kLanes>;
using Counts = Vector<int64_t, kLanes>;

// A run of consecutive vectors that one thread searches.
struct Slice {
  float* tiles;       // [slots / kTile, dimension, kTile]
  int64_t* index;     // of the vector in each slot
  int64_t slots = 0;  // in use or empty, without the rest of the last tile
  int64_t empty = 0;
};

struct Candidate {
  double similarity;
  int64_t slice, slot, index;
};

HF_INLINE int64_t tiles_of(int64_t slots) { return (slots + kTile - 1) / kTile; }

HF_INLINE float* entry(const Slice& slice, int64_t slot, int64_t d, int64_t dimension) {
  return slice.tiles + (slot / kTile * dimension + d) * kTile + slot % kTile;
}

HF_INLINE void empty_slot(Slice& slice, int64_t slot, int64_t dimension) {
  *entry(slice, slot, 0, dimension) = std::numeric_limits<float>::quiet_NaN();
}

void empty_rest_of_tile(Slice& slice, int64_t dimension) {
  for (int64_t slot = slice.slots; slot < tiles_of(slice.slots) * kTile; ++slot) {
    for (int64_t d = 1; d < dimension; ++d) *entry(slice, slot, d, dimension) = 0;
    empty_slot(slice, slot, dimension);
  }
}

void pack(Slice& slice, int64_t dimension) {
  int64_t to = 0;
  for (int64_t from = 0; from < slice.slots; ++from) {
    const float first = *entry(slice, from, 0, dimension);
    if (first != first) continue;
    for (int64_t d = 0; d < dimension; ++d) *entry(slice, to, d, dimension) = *entry(slice, from, d, dimension);
    slice.index[to++] = slice.index[from];
  }
  slice.slots = to;
  slice.empty = 0;
  empty_rest_of_tile(slice, dimension);
}

void remove_slot(Slice& slice, int64_t slot, int64_t dimension) {
  empty_slot(slice, slot, dimension);
  if (++slice.empty * 8 > slice.slots) pack(slice, dimension);
}

// The most similar vector of the slice, the first of several; similarity is minus infinity where there is none.
template <bool kDistance>
Candidate search(const Slice& slice, const double* query, int64_t dimension) {
  Doubles best[kGroups];
  Counts best_tile[kGroups] = {};
  for (int g = 0; g < kGroups; ++g) best[g] = Doubles{} - std::numeric_limits<double>::infinity();
  const float* tile = slice.tiles;
  for (int64_t t = 0; t < tiles_of(slice.slots); ++t, tile += dimension * kTile) {
    Doubles similarity[kGroups] = {};
    for (int64_t d = 0; d < dimension; ++d) {
      const Doubles q = Doubles{} + query[d];
      for (int g = 0; g < kGroups; ++g) {
        const auto single = *reinterpret_cast<const Vector<float, kLanes>*>(tile + d * kTile + g * kLanes);
        const Doubles v = __builtin_convertvector(single, Doubles);
        if constexpr (kDistance) {
          const Doubles difference = v - q;
          similarity[g] = difference > 0 ? -difference : difference;
        } else {
          similarity[g] += v * q;
        }
      }
    }
    for (int g = 0; g < kGroups; ++g) {
      const auto larger = similarity[g] > best[g];
      best[g] = larger ? similarity[g] : best[g];
      best_tile[g] = larger ? Counts{} + t : best_tile[g];
    }
  }
  Candidate found{-std::numeric_limits<double>::infinity(), 0, 0, 0};
  for (int g = 0; g < kGroups; ++g) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const double s = best[g][lane];
      const int64_t slot = best_tile[g][lane] * kTile + g * kLanes + lane;
      if (s > found.similarity || (s == found.similarity && slot < found.slot)) found = {s, 0, slot, 0};
    }
  }
  if (slice.slots > 0) found.index = slice.index[found.slot];
  return found;
}

HF_INLINE bool is_zero(const float* vector, int64_t dimension) {
  for (int64_t d = 0; d < dimension; ++d)
    if (vector[d] != 0) return false;
  return true;
}

// One chain, searched by `slices` threads. Each leaves its candidate and a copy of that vector; after one barrier all
// of them pick the same winner. Two sets of candidates, in turn: the next one is written while this one is read.
template <bool kDistance>
void chain(const float* vectors, int64_t* order, int64_t count, int64_t dimension, int64_t slices) {
  // A zero vector is similar to nothing; zeros come last, in their order.
  Scratch<int64_t> kept(count);
  int64_t searched = 0;
  for (int64_t i = 0; i < count; ++i)
    if (kDistance || !is_zero(vectors + i * dimension, dimension)) kept.data()[searched++] = i;
  for (int64_t i = 0, next = 0, last = searched; i < count; ++i) {
    if (next < searched && kept.data()[next] == i)
      ++next;
    else
      order[last++] = i;
  }
  if (searched == 0) return;

  const int64_t share = tiles_of((searched + slices - 1) / slices) * kTile;
  Scratch<float> tiles(share * slices * dimension);
  Scratch<int64_t> index(share * slices);
  Scratch<Slice> slice(slices);
  Scratch<Candidate> candidates(2 * slices);
  Scratch<double> queries(2 * slices * dimension);
  for (int64_t s = 0; s < slices; ++s) {
    Slice part{tiles.data() + s * share * dimension, index.data() + s * share};
    for (int64_t at = s * share; at < (s + 1) * share && at < searched; ++at, ++part.slots) {
      part.index[part.slots] = kept.data()[at];
      for (int64_t d = 0; d < dimension; ++d)
        *entry(part, part.slots, d, dimension) = vectors[kept.data()[at] * dimension + d];
    }
    empty_rest_of_tile(part, dimension);
    slice.data()[s] = part;
  }

#pragma omp parallel num_threads(slices) if (slices > 1)
  {
    Scratch<double> first(dimension);
    for (int64_t d = 0; d < dimension; ++d) first.data()[d] = vectors[kept.data()[0] * dimension + d];
    const double* query = first.data();
    Candidate current{0, 0, 0, kept.data()[0]};
    for (int64_t step = 1; step < searched; ++step) {
      Candidate* const found = candidates.data() + step % 2 * slices;
      double* const copies = queries.data() + step % 2 * slices * dimension;
#pragma omp for schedule(static)
      for (int64_t s = 0; s < slices; ++s) {
        Slice& part = slice.data()[s];
        if (s == current.slice) remove_slot(part, current.slot, dimension);
        Candidate candidate = search<kDistance>(part, query, dimension);
        candidate.slice = s;
        found[s] = candidate;
        for (int64_t d = 0; d < dimension && part.slots > 0; ++d)
          copies[s * dimension + d] = *entry(part, candidate.slot, d, dimension);
        if (s == 0) order[step - 1] = current.index;
      }
      current = found[0];
      for (int64_t s = 1; s < slices; ++s)
        if (found[s].similarity > current.similarity) current = found[s];
      query = copies + current.slice * dimension;
    }
#pragma omp single
    order[searched - 1] = current.index;
  }
}

template <bool kDistance>
void all_chains(const GreedyChainParams& p, int threads) {
  int64_t items = 0;
  for (int64_t j = 0; j < p.job_count; ++j) items += p.jobs[j].batch;
  const auto run = [&](int64_t item, bool team) {
    const GreedyChains* job = p.jobs;
    for (; item >= job->batch; ++job) item -= job->batch;
    if ((job->count * job->dimension >= kTeamNumbers && threads > 1) != team) return;
    chain<kDistance>(job->vectors + item * job->count * job->dimension, job->order + item * job->count, job->count,
                     job->dimension, team ? threads : 1);
  };
  for (int64_t item = 0; item < items; ++item) run(item, true);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t item = 0; item < items; ++item) run(item, false);
}

}  // namespace

void greedy_chain(const GreedyChainParams& p, int threads) {
  if (p.similarity == Similarity::kDistance) return all_chains<true>(p, threads);
  all_chains<false>(p, threads);
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
