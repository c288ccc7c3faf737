#pragma once
// a = SiLU(x + in_bias);  z = depthwise 3x3 of a (zero padding) + bias;  out = z[:C] * SiLU(z[C:])
// x [rows, height * width, 2C], out [rows, height * width, C], weight [2C, 3, 3].
//
// Traffic: read 2C, write C elements per token; backward read 3C, write 2C (4C with grad_conv).
// Rows and columns shared by two blocks come from the L2.
#include <cuda_runtime.h>

#include <cstdint>

namespace mfd::cuda {

template <typename T>
struct GluDepthwiseParams {
  const T* x;
  const T* weight;
  const T* bias;
  const T* in_bias;  // or null
  T* out;            // forward
  const T* grad;     // backward: [rows, tokens, C]
  T* grad_x;         // backward: like x
  T* grad_conv;      // backward: the gradient at z, like x; null: not wanted
  int64_t rows;
  int height, width, channels;
};

template <typename T>
void launch_glu_depthwise(const GluDepthwiseParams<T>& params, cudaStream_t stream);

template <typename T>
void launch_glu_depthwise_backward(const GluDepthwiseParams<T>& params, cudaStream_t stream);

}  // namespace mfd::cuda
