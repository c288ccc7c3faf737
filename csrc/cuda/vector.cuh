#pragma once
// 16-byte accesses to rows of float, __nv_bfloat16 or __half; arithmetic is in float.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace mfd::cuda {

// Elements of T in one 16-byte access.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

// N elements that move together; at most 16 bytes per access.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T value[N];
};

// N elements at p, which is aligned to the pack.
template <int N, typename T>
__device__ __forceinline__ void load(const T* __restrict__ p, float (&out)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = static_cast<float>(pack.value[j]);
}

// Rounds to T and writes N elements at p, which is aligned to the pack.
template <int N, typename T>
__device__ __forceinline__ void store(T* __restrict__ p, const float (&in)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int j = 0; j < N; ++j) pack.value[j] = static_cast<T>(in[j]);
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// True if every row of a [rows, n] array with this row stride starts at a multiple of 16 bytes.
template <typename T>
bool rows_aligned(const T* p, int64_t rows, int64_t stride) {
  const bool base = reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return p == nullptr || (base && (rows == 1 || stride % kVector<T> == 0));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mfd::cuda
