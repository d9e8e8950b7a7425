#include "hyperfast/generate.h"

#include "common/generate.h"
#include "cpu/group.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

namespace {

template <class T>
void forward(const GenerateParams& p, int threads) {
  const int64_t chunks = chunk_count(p);
#pragma omp parallel num_threads(threads)
  {
    Block<T> block;
    Scratch<T> scratch(p.batch * trunk_floats(p));
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) generate_chunk<T>(block, p, chunk, scratch.data());
  }
}

template <class T>
void backward(const GenerateParams& p, int threads) {
  const int64_t chunks = chunk_count(p);
#pragma omp parallel num_threads(threads)
  {
    Block<T> block;
    Scratch<T> scratch(p.batch * (trunk_floats(p) + p.hidden));
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) generate_backward_chunk<T>(block, p, chunk, scratch.data());
    finish_streams();
  }
  Block<T> block;
  generate_finish<T>(block, p);
}

}  // namespace

void generate_forward(const GenerateParams& p, int threads) {
  p.dtype == DType::kFloat64 ? forward<double>(p, threads) : forward<float>(p, threads);
}

void generate_backward(const GenerateParams& p, int threads) {
  p.dtype == DType::kFloat64 ? backward<double>(p, threads) : backward<float>(p, threads);
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
