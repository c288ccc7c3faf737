#pragma once
// x_t = (1 - t) x0 + t noise;  target = noise - x0.  [rows, n] arrays, t [rows] float.
// Traffic: 2 reads and 1 or 2 writes per element.
#include <cuda_runtime.h>

#include <cstdint>

namespace mfd::cuda {

template <typename T>
struct InterpolateParams {
  const T* x0;
  const T* noise;
  const float* t;
  T* x_t;
  T* target;  // null: not wanted
  int64_t rows, n;
};

template <typename T>
void launch_interpolate(const InterpolateParams<T>& params, cudaStream_t stream);

}  // namespace mfd::cuda
