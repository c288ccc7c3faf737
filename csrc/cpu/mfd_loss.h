#pragma once
// diff_b = (end_aux_b - end_teacher_b) / span_b            the mean-velocity difference u_T - u_A
// loss = sum_b weight_b <diff_b, x_b> / numel;  distance_b = |diff_b|_2;
// grad_b = weight_b diff_b / numel                          the gradient of the loss to x
//
// x [rows, n]; the ends are [rows, n] with a free row stride (two planes of one state buffer).
// Traffic: 3 reads and 1 write per element.  Sums run over fixed blocks of kLossBlock elements in
// double, so the result does not depend on the number of threads.
#include <algorithm>

#include "cpu/scalar.h"

namespace mfd {

constexpr int64_t kLossBlock = 4096;

template <typename T>
struct MfdLossParams {
  const T* x;
  const T* end_teacher;
  const T* end_aux;
  const float* span;    // [rows]
  const float* weight;  // [rows], or null for 1
  T* grad;              // [rows, n]
  double* partial_loss;      // [rows, blocks]
  double* partial_distance;  // [rows, blocks]
  int64_t n, blocks, stride_teacher, stride_aux;
  double inverse_numel;
};

template <typename T>
void mfd_loss_cpu(const MfdLossParams<T>& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / p.blocks;
    const int64_t lo = (task - row * p.blocks) * kLossBlock;
    const int64_t hi = std::min(lo + kLossBlock, p.n);
    const T* __restrict__ x = p.x + row * p.n;
    const T* __restrict__ teacher = p.end_teacher + row * p.stride_teacher;
    const T* __restrict__ aux = p.end_aux + row * p.stride_aux;
    T* __restrict__ grad = p.grad + row * p.n;
    const A inverse_span = A{1} / static_cast<A>(p.span[row]);
    const A weight = p.weight ? static_cast<A>(p.weight[row]) : A{1};
    const A scale = weight * static_cast<A>(p.inverse_numel);

    // Eight running sums: independent chains that the compiler keeps in vector registers.
    constexpr int kWays = 8;
    double dot[kWays] = {}, square[kWays] = {};
    const auto element = [&](int64_t i, int way) {
      const A diff = (static_cast<A>(aux[i]) - static_cast<A>(teacher[i])) * inverse_span;
      grad[i] = static_cast<T>(diff * scale);
      dot[way] += static_cast<double>(diff) * static_cast<double>(static_cast<A>(x[i]));
      square[way] += static_cast<double>(diff) * static_cast<double>(diff);
    };
    int64_t i = lo;
    for (; i + kWays <= hi; i += kWays)
      for (int way = 0; way < kWays; ++way) element(i + way, way);
    for (; i < hi; ++i) element(i, 0);

    double dot_sum = 0.0, square_sum = 0.0;
    for (int way = 0; way < kWays; ++way) dot_sum += dot[way], square_sum += square[way];
    p.partial_loss[task] = static_cast<double>(weight) * dot_sum * p.inverse_numel;
    p.partial_distance[task] = square_sum;
  }
}

}  // namespace mfd
