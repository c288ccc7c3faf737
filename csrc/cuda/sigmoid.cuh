#pragma once
// Sigmoid and the softmax's exponential from the special-function unit: 2^x and 1/x to 2 ulp of
// float.
#include <cuda_runtime.h>

namespace mfd::cuda {

constexpr float kLog2E = 1.44269504f;

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// max(x, low) that keeps a NaN: a step that has gone wrong must show.
__device__ __forceinline__ float at_least(float x, float low) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(low));
  return y;
}

// 1 / (1 + e^-x) of N values.  With kPaired two of them share one reciprocal,
// 1/a = b / (a b): the special-function unit is what limits a 16-bit depthwise unit, at 6 calls an
// output without and 4.5 with.  a b must stay finite: x below -41.5 counts as -41.5, where SiLU is
// 4e-17, nothing in 16 bits.  A NaN makes its partner one too.
template <bool kPaired, int N>
__device__ __forceinline__ void sigmoid(float (&x)[N], float (&out)[N]) {
  if constexpr (kPaired) {
    static_assert(N % 2 == 0);
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      x[i] = at_least(x[i], -41.5f);
      x[i + 1] = at_least(x[i + 1], -41.5f);
      const float a = 1.0f + fast_exp2(-kLog2E * x[i]);
      const float b = 1.0f + fast_exp2(-kLog2E * x[i + 1]);
      const float inverse = fast_reciprocal(a * b);
      out[i] = b * inverse;
      out[i + 1] = a * inverse;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = fast_reciprocal(1.0f + fast_exp2(-kLog2E * x[i]));
  }
}

}  // namespace mfd::cuda
