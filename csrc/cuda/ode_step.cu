#include "cuda/ode_step.cuh"
#include "cuda/vector.cuh"

namespace mfd::cuda {
namespace {

constexpr int kThreads = 256;

// What is the same for all elements of one trajectory.
template <typename V>
struct Trajectory {
  float* x;
  float* history;
  const V* v;
  V* input;
  float a, b, c, p, q;
  bool combine;  // guided: v and input have a second, unconditional lane behind the first

  __device__ Trajectory(const OdeStepParams<V>& params, int64_t row) {
    const int64_t sample = row / params.trajectories, s = row - sample * params.trajectories;
    const int64_t lane = sample * params.lanes + s + (params.guided && s > 0 ? 1 : 0);
    const float* coef = params.coef + 5 * sample;
    x = params.x + row * params.n;
    history = params.history ? params.history + row * params.n : nullptr;
    v = params.v + lane * params.n;
    input = params.input ? params.input + lane * params.n : nullptr;
    a = coef[0], b = coef[1], c = coef[2], p = coef[3], q = coef[4];
    combine = params.guided && s == 0;
  }
};

template <int N, typename V>
__device__ __forceinline__ void advance(const Trajectory<V>& k, const int64_t i, const int64_t n,
                                        const float guidance) {
  float x[N], v[N], next[N];
  load<N>(k.x + i, x);
  load<N>(k.v + i, v);
  if (k.combine) {
    float uncond[N];
    load<N>(k.v + n + i, uncond);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = uncond[j] + guidance * (v[j] - uncond[j]);
  }
#pragma unroll
  for (int j = 0; j < N; ++j) next[j] = k.a * x[j] + k.b * v[j];
  if (k.history != nullptr) {
    float h[N];
    load<N>(k.history + i, h);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      next[j] += k.c * h[j];
      h[j] = k.p * x[j] + k.q * v[j];
    }
    store<N>(k.history + i, h);
  }
  store<N>(k.x + i, next);
  if (k.input != nullptr) {
    store<N>(k.input + i, next);
    if (k.combine) store<N>(k.input + n + i, next);
  }
}

// One thread advances N elements of one trajectory (the last of a ragged one fewer, one by one); a
// block stays inside one trajectory, so every branch above is the same for all its threads.
template <typename V, int N>
__global__ __launch_bounds__(kThreads) void ode_step_kernel(const OdeStepParams<V> p,
                                                            const int64_t blocks_per_row) {
  const int64_t row = blockIdx.x / blocks_per_row;  // sample * trajectories + s
  const int64_t block = blockIdx.x - row * blocks_per_row;
  const int64_t first = (block * kThreads + threadIdx.x) * N;
  const Trajectory<V> trajectory(p, row);
  if (first + N <= p.n) {
    advance<N>(trajectory, first, p.n, p.guidance);
  } else {
    for (int64_t i = first; i < p.n; ++i) advance<1>(trajectory, i, p.n, p.guidance);
  }
}

template <typename V, int N>
void launch(const OdeStepParams<V>& p, cudaStream_t stream) {
  const int64_t blocks_per_row = ceil_div(p.n, int64_t{kThreads} * N);
  const auto grid = static_cast<unsigned>(p.batch * p.trajectories * blocks_per_row);
  ode_step_kernel<V, N><<<grid, kThreads, 0, stream>>>(p, blocks_per_row);
}

}  // namespace

template <typename V>
void launch_ode_step(const OdeStepParams<V>& p, cudaStream_t stream) {
  const int64_t rows = p.batch * p.trajectories;
  if (rows == 0 || p.n == 0) return;  // an empty grid is a launch error
  const int64_t lanes = p.batch * p.lanes;
  const bool vector = rows_aligned(p.x, rows, p.n) && rows_aligned(p.history, rows, p.n) &&
                      rows_aligned(p.v, lanes, p.n) && rows_aligned(p.input, lanes, p.n);
  vector ? launch<V, kVector<V>>(p, stream) : launch<V, 1>(p, stream);
}

template void launch_ode_step(const OdeStepParams<float>&, cudaStream_t);
template void launch_ode_step(const OdeStepParams<__nv_bfloat16>&, cudaStream_t);
template void launch_ode_step(const OdeStepParams<__half>&, cudaStream_t);

}  // namespace mfd::cuda
