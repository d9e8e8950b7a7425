#include "hyperfast/predict.h"

#include <omp.h>

#include "cpu/matrix.h"
#include "cpu/predict_tile.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

namespace {

// Everything that tiles read, prepared in parallel; called by all threads of a region.
template <class M>
void prepare(const PredictPlan<M>& plan) {
  using A = typename M::Acc;
  const PredictParams& p = plan.p;
  const int64_t hidden = p.hidden, outputs = p.outputs, last = plan.last, ld = plan.ld;
  const A* first_weight = static_cast<const A*>(p.weight[0]);
  int64_t all_columns = 0;
  for (int j = 0; j < p.tables; ++j) all_columns += p.table_width[j];
  const int64_t stride = p.concat ? all_columns : p.table_width[0];

  int64_t offset = 0;
  for (int j = 0; j < p.tables; ++j) {
    const int64_t width = p.table_width[j], rows = p.table_rows[j];
    const A* weight = first_weight + offset;
    if (p.concat) offset += width;
    if (p.concat || j == 0) {
#pragma omp for schedule(static) nowait
      for (int64_t panel = 0; panel < panel_count<Exact<A>>(hidden); ++panel)
        pack_panel<Exact<A>>(plan.first_weight[j], panel, width, hidden,
                             [&](int64_t k, int64_t n) { return weight[n * stride + k]; });
    }
    if (!plan.embedding[j]) continue;
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; ++row) {
      A* to = plan.embedding[j] + row * plan.widths[j];
      std::memcpy(to, static_cast<const A*>(p.embedding[j]) + row * width, width * sizeof(A));
      for (int64_t k = width; k < plan.widths[j]; ++k) to[k] = 0;
    }
  }
  for (int layer = 2; layer <= last; ++layer) {
    const A* weight = plan.weight(layer);
#pragma omp for schedule(static) nowait
    for (int64_t panel = 0; panel < panel_count<M>(hidden); ++panel) {
      pack_panel<M>(plan.forward[layer], panel, hidden, hidden,
                    [&](int64_t k, int64_t n) { return weight[n * hidden + k]; });
      if (plan.backward[layer])
        pack_panel<M>(plan.backward[layer], panel, hidden, hidden,
                      [&](int64_t k, int64_t n) { return weight[k * hidden + n]; });
    }
  }
  const A* last_weight = plan.weight(last + 1);
#pragma omp for schedule(static) nowait
  for (int64_t panel = 0; panel < panel_count<Exact<A>>(outputs); ++panel)
    pack_panel<Exact<A>>(plan.last_forward, panel, hidden, outputs,
                         [&](int64_t k, int64_t n) { return last_weight[n * hidden + k]; });
  if (plan.last_backward) {
#pragma omp for schedule(static) nowait
    for (int64_t panel = 0; panel < panel_count<Exact<A>>(hidden); ++panel)
      pack_panel<Exact<A>>(plan.last_backward, panel, outputs, hidden,
                           [&](int64_t k, int64_t n) { return last_weight[k * hidden + n]; });
  }
#pragma omp single
  for (int layer = 1; layer <= last + 1; ++layer) {
    const int64_t used = layer > last ? outputs : hidden, padded = layer > last ? plan.out_ld : ld;
    for (int64_t n = 0; n < padded; ++n)
      plan.bias[layer][n] = n < used ? static_cast<const A*>(p.bias[layer - 1])[n] : A(0);
  }  // and a barrier: the tables need the packed weights

  for (int j = 0; j < p.tables; ++j) {
    if (!plan.factorised[j]) continue;
    const int64_t rows = p.table_rows[j], width = p.table_width[j];
#pragma omp for schedule(static) nowait
    for (int64_t block = 0; block < (rows + kBlockRows - 1) / kBlockRows; ++block) {
      const int64_t row = block * kBlockRows, count = rows - row < kBlockRows ? rows - row : kBlockRows;
      multiply<Exact<A>>(count, hidden, width, static_cast<const A*>(p.embedding[j]) + row * width, width, 1,
                         {plan.first_weight[j]}, [&](int64_t i, int64_t column, auto& sum) {
                           Exact<A>::store({plan.table[j], nullptr}, ld, row + i, column, sum, false);
                         });
    }
  }
#pragma omp barrier
}

// The flat gradient from sums over all rows; called by all threads of a region.
template <class M, class A>
void finish(const PredictPlan<M>& plan, const PartialGradient<A>& sums) {
  const PredictParams& p = plan.p;
  const int64_t hidden = p.hidden;
  A* flat = static_cast<A*>(p.gradient);
  int64_t columns = 0;
  for (int j = 0; j < p.tables; ++j) columns = p.concat || j == 0 ? columns + p.table_width[j] : columns;

#pragma omp for schedule(static) nowait
  for (int64_t block = 0; block < (hidden + kBlockRows - 1) / kBlockRows; ++block) {
    const int64_t first = block * kBlockRows, count = hidden - first < kBlockRows ? hidden - first : kBlockRows;
    A* to = flat + first * columns;
    for (int j = 0; j < p.tables; ++j) {
      const int64_t width = p.table_width[j];
      const bool add = !p.concat && j > 0;
      if (plan.factorised[j]) {
        multiply<Exact<A>>(count, width, p.table_rows[j], sums.first[j] + first, 1, plan.ld,
                           {plan.embedding[j], plan.widths[j]}, [&](int64_t row, int64_t column, auto& sum) {
                             using V = typename Exact<A>::V;
                             for (auto& of_row : sum) {
                               A* at = to + row++ * columns + column;
                               int64_t left = width - column;
                               for (const V& x : of_row)
                                 for (int lane = 0; lane < kLanes<A> && left > 0; ++lane, --left, ++at)
                                   *at = add ? *at + x[lane] : x[lane];
                             }
                           });
      } else {
        for (int64_t row = 0; row < count; ++row)
          for (int64_t k = 0; k < width; ++k) {
            const A x = sums.first[j][(first + row) * plan.widths[j] + k];
            to[row * columns + k] = add ? to[row * columns + k] + x : x;
          }
      }
      if (p.concat) to += width;
    }
  }
  flat += hidden * columns;
  for (int layer = 1; layer <= plan.last + 1; ++layer) {
    const int64_t outputs = layer > plan.last ? p.outputs : hidden;
    if (layer > 1) {
#pragma omp for schedule(static) nowait
      for (int64_t row = 0; row < outputs; ++row)
        std::memcpy(flat + row * hidden, sums.weight[layer] + row * plan.ld, hidden * sizeof(A));
      flat += outputs * hidden;
    }
#pragma omp single nowait
    std::memcpy(flat, sums.bias[layer], outputs * sizeof(A));
    flat += outputs;
  }
}

template <class M>
bool run(const PredictParams& p, int threads) {
  using A = typename M::Acc;
  using Plan = PredictPlan<M>;
  Plan plan(p);
  const bool differentiates = plan.differentiates();
  const int64_t tiles = (p.count + Plan::kTileRows - 1) / Plan::kTileRows;

  // Gradients of a chunk of rows are added in their order, and then the chunks'. How many there are depends on the
  // work alone, so the result does not depend on the number of threads.
  Arena measure(nullptr);
  PartialGradient<A>().take(measure, plan);
  const int64_t partial_bytes = measure.used();
  int64_t most = Plan::kMostChunkBytes / partial_bytes;
  if (most > Plan::kMostChunks || !differentiates) most = Plan::kMostChunks;
  if (most < 1) most = 1;
  int64_t chunk = (p.count + most - 1) / most;
  if (chunk < Plan::kChunkRows) chunk = Plan::kChunkRows;
  chunk = round_up(chunk, Plan::kTileRows);
  const int64_t chunks = p.predictions ? tiles : (p.count + chunk - 1) / chunk;
  const int64_t rows = p.predictions ? Plan::kTileRows : chunk;

  auto lay_out = [&](Arena& arena, char** scratch, char** partials, double** losses) {
    plan.take(arena);
    Arena own(nullptr);
    PredictTile<M>(plan).take(own);
    *scratch = arena.take<char>(threads * own.used());
    *partials = arena.take<char>(differentiates ? chunks * partial_bytes : 0);
    *losses = arena.take<double>(chunks);
    return own.used();
  };
  char *scratch, *partials;
  double* losses;
  Arena sizes(nullptr);
  const int64_t scratch_bytes = lay_out(sizes, &scratch, &partials, &losses);
  Scratch<char> memory(sizes.used());
  Arena arena(memory.data());
  lay_out(arena, &scratch, &partials, &losses);

  bool valid = true;
#pragma omp parallel num_threads(threads)
  {
    prepare(plan);
    PredictTile<M> tile(plan);
    Arena own(scratch + omp_get_thread_num() * scratch_bytes);
    tile.take(own);
    bool mine = true;
#pragma omp for schedule(dynamic, 1)
    for (int64_t c = 0; c < chunks; ++c) {
      PartialGradient<A> partial;
      if (differentiates) {
        Arena share(partials + c * partial_bytes);
        partial.take(share, plan);
        std::memset(partials + c * partial_bytes, 0, partial_bytes);
      }
      const int64_t end = (c + 1) * rows < p.count ? (c + 1) * rows : p.count;
      losses[c] = 0;
      for (int64_t row = c * rows; row < end; row += Plan::kTileRows) {
        const int64_t count = end - row < Plan::kTileRows ? end - row : Plan::kTileRows;
        mine &= tile.run(row, count, differentiates ? &partial : nullptr, losses + c);
      }
    }
    if (!mine) {
#pragma omp atomic write
      valid = false;
    }
    if (differentiates) {
      A* all = reinterpret_cast<A*>(partials);
      const int64_t size = partial_bytes / int64_t(sizeof(A)), block = 1024;
#pragma omp for schedule(static)
      for (int64_t first = 0; first < size; first += block) {
        const int64_t end = first + block < size ? first + block : size;
        for (int64_t c = 1; c < chunks; ++c)
          for (int64_t k = first; k < end; ++k) all[k] += all[c * size + k];
      }
      PartialGradient<A> sums;
      Arena share(partials);
      sums.take(share, plan);
      finish(plan, sums);
    }
  }
  if (p.loss) {
    double total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += losses[c];
    *static_cast<A*>(p.loss) = A(total);
  }
  return valid;
}

}  // namespace

bool predict(const PredictParams& p, int threads) {
  if (p.dtype == DType::kFloat64) return run<Exact<double>>(p, threads);
#if defined(__AVX512BF16__)
  if (p.round) return run<Pairs>(p, threads);
#else
  if (p.round) return run<Rounded>(p, threads);
#endif
  return run<Exact<float>>(p, threads);
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
