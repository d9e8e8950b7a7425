// exp and log of vectors against the C library in a wider type, over the whole range; fails above one unit in the last
// place. And half precision of vectors against that of single numbers, bit for bit.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "cpu/group.h"

using namespace hyperfast::HYPERFAST_ISA;

namespace {

int failures = 0;

void check(const char* what, bool ok, double detail = 0) {
  if (!ok) ++failures;
  std::printf("%-28s %s %g\n", what, ok ? "right" : "WRONG", detail);
}

template <class A>
bool same(A a, A b) {
  return std::memcmp(&a, &b, sizeof(a)) == 0 || (a != a && b != b);
}

// In units in the last place of what is right; 0 for the nearest number.
template <class A>
double error(A found, long double right) {
  if (same(found, A(right))) return 0;
  const A near = std::fabs(A(right));
  const A unit = std::nextafter(near, std::numeric_limits<A>::infinity()) - near;
  return std::fabs(double((found - right) / unit));
}

template <class A, class Draw, class Vectors, class Right>
void sweep(const char* what, int64_t count, Draw draw, Vectors function, Right right) {
  constexpr int N = 64 / sizeof(A);
  double worst = 0;
  for (int64_t first = 0; first < count; first += N) {
    Vector<A, N> x;
    for (int k = 0; k < N; ++k) x[k] = draw(first + k);
    const Vector<A, N> y = function(x);
    for (int k = 0; k < N; ++k) {
      const A one = x[k], found = y[k];
      worst = std::max({worst, error(found, right(one)), error(A(function(one)), right(one))});
    }
  }
  check(what, worst <= 1, worst);
}

template <class A>
void run(const char* name) {
  const Lanes<A> lanes;
  const auto exp = [&](auto x) { return lanes.exp(x); };
  const auto log = [&](auto x) { return lanes.log(x); };
  const A infinity = std::numeric_limits<A>::infinity(), nan = std::numeric_limits<A>::quiet_NaN();
  const A edge = sizeof(A) == 4 ? 105 : 750;
  constexpr int64_t kCount = 1 << 21;
  std::printf("%s\n", name);
  const auto wide = [](A x) { return std::exp((long double)x); };
  sweep<A>("exp", kCount, [&](int64_t k) { return edge * (2 * A(k) / kCount - 1); }, exp, wide);
  sweep<A>("exp around 0", kCount, [&](int64_t k) { return 2 * A(k) / kCount - 1; }, exp, wide);
  const auto wide_log = [](A x) { return std::log((long double)x); };
  const A lowest = std::log(std::numeric_limits<A>::min()), highest = std::log(std::numeric_limits<A>::max());
  const auto spread = [&](int64_t k) {
    return std::max(std::exp(lowest + (highest - lowest) * A(k) / kCount), std::numeric_limits<A>::min());
  };
  sweep<A>("log", kCount, spread, log, wide_log);
  sweep<A>("log around 1", kCount, [&](int64_t k) { return A(0.5) + A(k) / kCount; }, log, wide_log);
  check("special values of exp", exp(-infinity) == 0 && exp(infinity) == infinity && exp(A(0)) == 1 &&
                                     exp(-std::numeric_limits<A>::max()) == 0 && std::isnan(exp(nan)));
  check("special values of log", log(A(1)) == 0 && log(infinity) == infinity && std::isnan(log(nan)));
}

template <class T>
void halves(const char* name) {
  const Lanes<float> lanes;
  const Positions<16> first{0};
  bool stored = true, loaded = true;
  T half[16];
  uint16_t bits;
  for (uint64_t pattern = 0; pattern < 1ull << 32; pattern += 16 * 1009) {
    Vector<float, 16> x;
    for (int k = 0; k < 16; ++k) {
      const uint32_t word = pattern + 1009 * k;
      std::memcpy(reinterpret_cast<float*>(&x) + k, &word, 4);
    }
    lanes.store(half, first, x);
    for (int k = 0; k < 16; ++k) {
      const T one(x[k]);
      stored = stored && std::memcmp(&half[k], &one, 2) == 0;
    }
  }
  for (uint32_t pattern = 0; pattern < 1 << 16; pattern += 16) {
    for (int k = 0; k < 16; ++k) {
      bits = pattern + k;
      std::memcpy(&half[k], &bits, 2);
    }
    const Vector<float, 16> x = lanes.load(half, first);
    for (int k = 0; k < 16; ++k) loaded = loaded && same(float(half[k]), float(x[k]));
  }
  std::printf("%s\n", name);
  check("stored", stored);
  check("loaded", loaded);
}

}  // namespace

int main() {
  halves<BFloat16>("bfloat16");
  halves<Float16>("float16");
  run<float>("float");
  run<double>("double");
  return failures ? 1 : 0;
}
