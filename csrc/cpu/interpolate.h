#pragma once
// x_t = (1 - t) x0 + t noise;  target = noise - x0.  [rows, n] arrays, t [rows] as wide
// as sums.  Traffic: 2 reads and 1 or 2 writes per element.
#include "cpu/scalar.h"

namespace mfd {

template <typename T>
struct InterpolateParams {
  const T* x0;
  const T* noise;
  const accumulate_t<T>* t;
  T* x_t;
  T* target;  // null: not wanted
  int64_t n;
};

template <typename T>
void interpolate_cpu(const InterpolateParams<T>& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for_row_segments(begin, end, p.n, [&](int64_t row, int64_t lo, int64_t hi) {
    const A t = p.t[row];
    const A keep = A{1} - t;
    const int64_t base = row * p.n;
    if (p.target == nullptr) {
      for (int64_t i = base + lo; i < base + hi; ++i)
        p.x_t[i] = static_cast<T>(keep * static_cast<A>(p.x0[i]) + t * static_cast<A>(p.noise[i]));
    } else {
      for (int64_t i = base + lo; i < base + hi; ++i) {
        const A x0 = static_cast<A>(p.x0[i]), noise = static_cast<A>(p.noise[i]);
        p.x_t[i] = static_cast<T>(keep * x0 + t * noise);
        p.target[i] = static_cast<T>(noise - x0);
      }
    }
  });
}

}  // namespace mfd
