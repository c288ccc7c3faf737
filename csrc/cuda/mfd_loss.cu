#include "cuda/mfd_loss.cuh"
#include "cuda/vector.cuh"

namespace mfd::cuda {
namespace {

constexpr int kWarps = kLossThreads / 32;

struct Sums {
  float dot = 0.0f;     // <d, x>
  float square = 0.0f;  // <d, d>
};

// The sum over a warp, the same on every lane.
template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

template <typename T>
struct Row {
  const T* x;
  const T* teacher;
  const T* aux;
  T* grad;
  float scale;  // weight / (span * numel)

  __device__ Row(const MfdLossParams<T>& p, int64_t row)
      : x(p.x + row * p.sums.n),
        teacher(p.end_teacher + row * p.stride_teacher),
        aux(p.end_aux + row * p.stride_aux),
        grad(p.grad + row * p.sums.n) {
    const float weight = p.sums.weight ? p.sums.weight[row] : 1.0f;
    scale = weight / p.sums.span[row] / static_cast<float>(p.sums.rows * p.sums.n);
  }
};

template <int N, typename T>
__device__ __forceinline__ void accumulate(const Row<T>& row, const int64_t i, Sums& sums) {
  float x[N], teacher[N], d[N];
  load<N>(row.aux + i, d);
  load<N>(row.teacher + i, teacher);
  load<N>(row.x + i, x);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    d[j] -= teacher[j];
    sums.dot = fmaf(d[j], x[j], sums.dot);
    sums.square = fmaf(d[j], d[j], sums.square);
    d[j] *= row.scale;
  }
  store<N>(row.grad + i, d);
}

// One block: kLossBlock elements of one row.
template <typename T, int N>
__global__ __launch_bounds__(kLossThreads) void mfd_loss_kernel(const MfdLossParams<T> p) {
  constexpr int kSteps = kVector<T> / N;
  const int64_t n = p.sums.n, blocks = p.sums.blocks;
  const int64_t row_index = blockIdx.x / blocks;
  const int64_t begin = (blockIdx.x - row_index * blocks) * kLossBlock<T>;
  const Row<T> row(p, row_index);

  Sums sums;
  if (begin + kLossBlock<T> <= n) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      accumulate<N>(row, begin + (step * kLossThreads + threadIdx.x) * int64_t{N}, sums);
  } else {  // the last, ragged block
    for (int64_t i = begin + threadIdx.x; i < n; i += kLossThreads) accumulate<1>(row, i, sums);
  }

  __shared__ Sums warp_sums[kWarps];
  sums.dot = warp_sum(sums.dot);
  sums.square = warp_sum(sums.square);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sums;
  __syncthreads();
  if (threadIdx.x == 0) {
    Sums total;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      total.dot += warp_sums[warp].dot;
      total.square += warp_sums[warp].square;
    }
    p.sums.dots[blockIdx.x] = total.dot;
    p.sums.squares[blockIdx.x] = total.square;
  }
}

// One block for all rows: a warp takes every kWarps-th row, its lanes every 32nd partial.  The sums
// are in double: a handful of additions, and nothing to lose after the float sums of the blocks.
__global__ __launch_bounds__(kLossThreads) void mfd_loss_finish_kernel(const LossSums p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double loss = 0.0;
  for (int64_t row = warp; row < p.rows; row += kWarps) {
    double dot = 0.0, square = 0.0;
    for (int64_t i = row * p.blocks + lane; i < (row + 1) * p.blocks; i += 32) {
      dot += p.dots[i];
      square += p.squares[i];
    }
    dot = warp_sum(dot);
    square = warp_sum(square);
    const double span = p.span[row];
    loss += (p.weight ? p.weight[row] : 1.0f) * dot / span;
    if (lane == 0) p.distance[row] = static_cast<float>(sqrt(square) / fabs(span));
  }

  __shared__ double warp_loss[kWarps];
  if (lane == 0) warp_loss[warp] = loss;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0.0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) total += warp_loss[i];
    *p.loss = static_cast<float>(total / static_cast<double>(p.rows * p.n));
  }
}

}  // namespace

template <typename T>
void launch_mfd_loss(const MfdLossParams<T>& p, cudaStream_t stream) {
  const int64_t rows = p.sums.rows, n = p.sums.n;
  if (rows == 0 || n == 0) return;  // an empty grid is a launch error
  const bool vector = rows_aligned(p.x, rows, n) && rows_aligned(p.grad, rows, n) &&
                      rows_aligned(p.end_teacher, rows, p.stride_teacher) &&
                      rows_aligned(p.end_aux, rows, p.stride_aux);
  const auto grid = static_cast<unsigned>(rows * p.sums.blocks);
  if (vector) {
    mfd_loss_kernel<T, kVector<T>><<<grid, kLossThreads, 0, stream>>>(p);
  } else {
    mfd_loss_kernel<T, 1><<<grid, kLossThreads, 0, stream>>>(p);
  }
  mfd_loss_finish_kernel<<<1, kLossThreads, 0, stream>>>(p.sums);
}

template void launch_mfd_loss(const MfdLossParams<float>&, cudaStream_t);
template void launch_mfd_loss(const MfdLossParams<__nv_bfloat16>&, cudaStream_t);
template void launch_mfd_loss(const MfdLossParams<__half>&, cudaStream_t);

}  // namespace mfd::cuda
