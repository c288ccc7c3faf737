#include "cuda/interpolate.cuh"
#include "cuda/vector.cuh"

namespace mfd::cuda {
namespace {

constexpr int kThreads = 256;

// N elements of one row from index `at` of the whole array.
template <int N, typename T>
__device__ __forceinline__ void interpolate(const InterpolateParams<T>& p, const int64_t at,
                                            const float t) {
  float x0[N], noise[N], out[N];
  load<N>(p.x0 + at, x0);
  load<N>(p.noise + at, noise);
  const float keep = 1.0f - t;
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = keep * x0[j] + t * noise[j];
  store<N>(p.x_t + at, out);
  if (p.target == nullptr) return;
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = noise[j] - x0[j];
  store<N>(p.target + at, out);
}

// One thread moves N elements (the last of a ragged row fewer, one by one); a block stays inside
// one row.  No loop: with 2048 threads on a multiprocessor the two 16-byte loads of each are enough
// in flight to fill the memory system.
template <typename T, int N>
__global__ __launch_bounds__(kThreads) void interpolate_kernel(const InterpolateParams<T> p,
                                                               const int64_t blocks_per_row) {
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t block = blockIdx.x - row * blocks_per_row;
  const int64_t first = (block * kThreads + threadIdx.x) * N;
  const float t = p.t[row];
  if (first + N <= p.n) {
    interpolate<N>(p, row * p.n + first, t);
  } else {
    for (int64_t i = first; i < p.n; ++i) interpolate<1>(p, row * p.n + i, t);
  }
}

template <typename T, int N>
void launch(const InterpolateParams<T>& p, cudaStream_t stream) {
  const int64_t blocks_per_row = ceil_div(p.n, int64_t{kThreads} * N);
  const auto grid = static_cast<unsigned>(p.rows * blocks_per_row);
  interpolate_kernel<T, N><<<grid, kThreads, 0, stream>>>(p, blocks_per_row);
}

}  // namespace

template <typename T>
void launch_interpolate(const InterpolateParams<T>& p, cudaStream_t stream) {
  if (p.rows == 0 || p.n == 0) return;  // an empty grid is a launch error
  const bool vector = rows_aligned(p.x0, p.rows, p.n) && rows_aligned(p.noise, p.rows, p.n) &&
                      rows_aligned(p.x_t, p.rows, p.n) && rows_aligned(p.target, p.rows, p.n);
  vector ? launch<T, kVector<T>>(p, stream) : launch<T, 1>(p, stream);
}

template void launch_interpolate(const InterpolateParams<float>&, cudaStream_t);
template void launch_interpolate(const InterpolateParams<__nv_bfloat16>&, cudaStream_t);
template void launch_interpolate(const InterpolateParams<__half>&, cudaStream_t);

}  // namespace mfd::cuda
