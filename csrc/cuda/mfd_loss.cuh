#pragma once
// d_b = end_aux_b - end_teacher_b;  the mean-velocity difference u_T - u_A is d_b / span_b
// loss = sum_b weight_b <d_b, x_b> / (span_b numel);  distance_b = |d_b|_2 / |span_b|;
// grad_b = weight_b d_b / (span_b numel)             the gradient of the loss to x
//
// x, grad [rows, n]; the ends are [rows, n] with a free row stride.  Traffic: 3 reads and 1 write
// per element, and 8 bytes per block.  Each block leaves its two sums in device memory, a second
// kernel adds them in a fixed order: no atomics, the same bits in every run.
#include <cuda_runtime.h>

#include <cstdint>

namespace mfd::cuda {

constexpr int kLossThreads = 256;

// The sums and what turns them into loss and distance.
struct LossSums {
  float* dots;          // [rows, blocks], <d, x>
  float* squares;       // [rows, blocks], <d, d>
  const float* span;    // [rows]
  const float* weight;  // [rows], or null for 1
  float* loss;          // [1]
  float* distance;      // [rows]
  int64_t rows, n;
  int64_t blocks;  // per row: mfd_loss_blocks<T>(n)
};

template <typename T>
struct MfdLossParams {
  const T* x;
  const T* end_teacher;
  const T* end_aux;
  T* grad;
  int64_t stride_teacher, stride_aux;
  LossSums sums;
};

// Elements per block: one 16-byte pack per thread, or as many elements one by one.
template <typename T>
constexpr int64_t kLossBlock = int64_t{kLossThreads} * (16 / sizeof(T));

template <typename T>
int64_t mfd_loss_blocks(int64_t n) {
  return (n + kLossBlock<T> - 1) / kLossBlock<T>;
}

template <typename T>
void launch_mfd_loss(const MfdLossParams<T>& params, cudaStream_t stream);

}  // namespace mfd::cuda
