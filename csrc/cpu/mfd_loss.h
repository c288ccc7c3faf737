#pragma once
// d_b = end_aux_b - end_teacher_b;  the mean-velocity difference u_T - u_A is d_b / span_b
// loss = sum_b weight_b <d_b, x_b> / (span_b numel);  distance_b = |d_b|_2 / |span_b|;
// grad_b = weight_b d_b / (span_b numel)             the gradient of the loss to x
//
// x [rows, n]; the ends are [rows, n] with a free row stride (two planes of one state buffer).
// Traffic: 3 reads and 1 write per element.
#include <algorithm>

#include "cpu/scalar.h"

namespace mfd {

// The sums run over blocks and, inside, over runs of fixed size: the result does not depend on the
// number of threads.  In a run each of kLossWays sums adds kLossRun / kLossWays = 16 products in
// the element type (vector registers), then goes to double: float rounding cannot build up.
constexpr int64_t kLossBlock = 8192;
constexpr int64_t kLossRun = 512;
constexpr int64_t kLossWays = 32;

template <typename T>
struct MfdLossParams {
  const T* x;
  const T* end_teacher;
  const T* end_aux;
  const accumulate_t<T>* span;    // [rows]
  const accumulate_t<T>* weight;  // [rows], or null for 1
  T* grad;                        // [rows, n]
  double* partial_loss;           // [rows, blocks]: <d, x>
  double* partial_distance;       // [rows, blocks]: <d, d>
  int64_t n, blocks, stride_teacher, stride_aux;
  double inverse_numel;
};

// Adds to dot and square what `count` elements contribute, and writes their gradient.
template <typename T, typename A = accumulate_t<T>>
void mfd_loss_run(const T* __restrict__ x, const T* __restrict__ teacher, const T* __restrict__ aux,
                  T* __restrict__ grad, int64_t count, A scale, double& dot, double& square) {
  A dots[kLossWays] = {}, squares[kLossWays] = {};
  const auto element = [&](int64_t i, int64_t way) {
    const A d = static_cast<A>(aux[i]) - static_cast<A>(teacher[i]);
    grad[i] = static_cast<T>(d * scale);
    dots[way] += d * static_cast<A>(x[i]);
    squares[way] += d * d;
  };
  int64_t i = 0;
  for (; i + kLossWays <= count; i += kLossWays)
    for (int64_t way = 0; way < kLossWays; ++way) element(i + way, way);
  for (int64_t way = 0; i < count; ++i, ++way) element(i, way);
  for (int64_t way = 0; way < kLossWays; ++way) {
    dot += static_cast<double>(dots[way]);
    square += static_cast<double>(squares[way]);
  }
}

template <typename T>
void mfd_loss_cpu(const MfdLossParams<T>& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / p.blocks;
    const int64_t lo = (task - row * p.blocks) * kLossBlock;
    const int64_t hi = std::min(lo + kLossBlock, p.n);
    const T* x = p.x + row * p.n;
    const T* teacher = p.end_teacher + row * p.stride_teacher;
    const T* aux = p.end_aux + row * p.stride_aux;
    T* grad = p.grad + row * p.n;
    const double weight = p.weight ? p.weight[row] : 1.0;
    const double factor = weight / static_cast<double>(p.span[row]) * p.inverse_numel;

    double dot = 0.0, square = 0.0;
    for (int64_t i = lo; i < hi; i += kLossRun)
      mfd_loss_run<T>(x + i, teacher + i, aux + i, grad + i, std::min(kLossRun, hi - i),
                      static_cast<A>(factor), dot, square);
    p.partial_loss[task] = factor * dot;
    p.partial_distance[task] = square;
  }
}

}  // namespace mfd
