#include "cuda/glu_tile.cuh"

namespace mfd::cuda {
namespace {

// One channel to a lane: two sets of sums are alive, the convolution's and the transposed one's.
constexpr int kVec = 1;
constexpr int kChannels = kGluLanes;
// Rows in shared memory on their way from x and grad; two of float leave room for two blocks.
template <typename T>
constexpr int kStages = sizeof(T) == 2 ? 3 : 2;

// SiLU' of both halves waits four rows for the gradient that it multiplies: 11 bits are enough for
// a 16-bit result.
template <typename T>
struct SlopeOf {
  using type = __half2;
};
template <>
struct SlopeOf<float> {
  using type = float2;
};

template <typename T>
struct Shared {
  T x[kStages<T>][2][kGluPadded][kChannels];
  T grad[kStages<T>][kGluSpan][kChannels];
  GluLine<kVec> a[2];
  GluLine<kVec> dz[2];
  typename SlopeOf<T>::type slope[4][kGluSpan][kGluLanes];
};

template <typename T>
struct Backward {
  static constexpr int kPrefetch = kStages<T>;  // rows ahead of the one that is added

  const GluDepthwiseParams<T>& p;
  const GluGrid& grid;
  Shared<T>& shared;
  const GluBlock block;
  const int lane, column;  // column: padded index to the left of the thread's first column
  const int64_t stride;
  GluTaps<kVec> taps;
  GluSums<kVec> z, da;

  __device__ bool in_image(int y) const { return y >= 0 && y < p.height; }
  __device__ int columns() const { return static_cast<int>(blockDim.y) * kGluColumns; }
  __device__ int64_t token(int y) const { return (block.row * p.height + y) * p.width; }

  // Row y of x, and row y - 2 of grad, which is needed at the same time.
  __device__ __forceinline__ void stage_rows(int y, int slot) {
    const int channels = p.channels - block.channel;
    if (y <= block.end + 1 && in_image(y)) {
      const T* row = p.x + token(y) * stride + block.channel;
      for (int half = 0; half < 2; ++half)
        stage<kChannels>(&shared.x[slot][half][0][0], row + int64_t{half} * p.channels, stride,
                         block.column - 1, columns() + 2, p.width, channels, grid.vector);
    }
    if (y - 2 <= block.end && in_image(y - 2)) {
      const T* row = p.grad + token(y - 2) * p.channels + block.channel;
      stage<kChannels>(&shared.grad[slot][0][0], row, int64_t{p.channels}, block.column, columns(),
                       p.width, channels, grid.vector);
    }
    __pipeline_commit();
  }

  // SiLU of one pixel, zero outside the image; its derivative is kept for the thread's own columns.
  __device__ __forceinline__ void activate_column(int at, int slot, GluLine<kVec>& to, int own,
                                                  int slope_slot) {
    const int image = block.column - 1 + at;
    float a[2] = {}, slope[2] = {};
    if (image >= 0 && image < p.width) {
      float x[2], s[2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        x[half] = static_cast<float>(shared.x[slot][half][at][lane]) + taps.in_bias[half][0];
      sigmoid<kGluPaired<T>>(x, s);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[half] = x[half] * s[half];
        slope[half] = fmaf(a[half], 1.0f - s[half], s[half]);
      }
    }
    to[0][at][lane].value[0] = a[0];
    to[1][at][lane].value[0] = a[1];
    if (own < 0) return;
    auto& kept = shared.slope[slope_slot][column + own][lane];
    if constexpr (sizeof(T) == 2)
      kept = __floats2half2_rn(slope[0], slope[1]);
    else
      kept = make_float2(slope[0], slope[1]);
  }

  __device__ __forceinline__ void activate(int slot, GluLine<kVec>& to, int slope_slot) {
#pragma unroll
    for (int o = 0; o < kGluColumns; ++o) activate_column(column + 1 + o, slot, to, o, slope_slot);
    if (threadIdx.y == 0) activate_column(0, slot, to, -1, 0);
    if (threadIdx.y == blockDim.y - 1) activate_column(column + 1 + kGluColumns, slot, to, -1, 0);
  }

  // The gradient at z of row y from the finished sums; zero outside the image.
  __device__ __forceinline__ void gate_gradient(int y, int slot, GluLine<kVec>& to) {
    float gate[kGluColumns], s[kGluColumns];
#pragma unroll
    for (int o = 0; o < kGluColumns; ++o) gate[o] = z[0][o][1][0];
    sigmoid<kGluPaired<T>>(gate, s);
    const int channel = block.channel + lane;
#pragma unroll
    for (int o = 0; o < kGluColumns; ++o) {
      const int image = block.column + column + o;
      float d[2] = {};
      if (image >= 0 && image < p.width && in_image(y)) {
        const float grad = static_cast<float>(shared.grad[slot][column + o][lane]);
        const float value = gate[o] * s[o];
        d[0] = grad * value;
        d[1] = grad * z[0][o][0][0] * fmaf(value, 1.0f - s[o], s[o]);
        // Rows and columns that overlap another block are written by the one that owns them.
        if (p.grad_conv != nullptr && owns(y, column + o) && channel < p.channels) {
          T* at = p.grad_conv + (token(y) + image) * stride + channel;
          at[0] = static_cast<T>(d[0]);
          at[p.channels] = static_cast<T>(d[1]);
        }
      }
      to[0][column + 1 + o][lane].value[0] = d[0];
      to[1][column + 1 + o][lane].value[0] = d[1];
    }
  }

  __device__ bool owns(int y, int at) const {
    return y >= block.begin && y < block.end && at >= grid.halo && at < columns() - grid.halo;
  }

  __device__ __forceinline__ void write_row(int y, int slope_slot) {
    const int channel = block.channel + lane;
#pragma unroll
    for (int o = 0; o < kGluColumns; ++o) {
      const int image = block.column + column + o;
      if (image >= p.width || channel >= p.channels || !owns(y, column + o)) continue;
      const auto kept = shared.slope[slope_slot][column + o][lane];
      T* at = p.grad_x + (token(y) + image) * stride + channel;
      at[0] = static_cast<T>(da[0][o][0][0] * static_cast<float>(kept.x));
      at[p.channels] = static_cast<T>(da[0][o][1][0] * static_cast<float>(kept.y));
    }
  }

  // The outermost columns of dz, which no thread writes: zero if they are outside the image, and
  // only used for columns that another block owns if not.
  __device__ __forceinline__ void clear_margins() {
    if (threadIdx.y != 0) return;
#pragma unroll
    for (int buffer = 0; buffer < 2; ++buffer)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        shared.dz[buffer][half][0][lane].value[0] = 0.0f;
        shared.dz[buffer][half][columns() + 1][lane].value[0] = 0.0f;
      }
  }

  // Iteration y: row y - 2 of dz finishes row y - 3 of the result, row y of a finishes row y - 1 of
  // z and so of dz, row y + 1 is activated and a later one is fetched.  One barrier.
  __device__ __forceinline__ void run() {
    const int first = block.begin - 2;
    clear_margins();
    for (int i = 0; i < kPrefetch - 1; ++i) stage_rows(first + i, i);
#pragma unroll 1
    for (int i = 0; i < block.end - first + 4; ++i) {
      const int y = first - 1 + i;
      __pipeline_wait_prior(kPrefetch - 2);
      __syncthreads();
      stage_rows(y + kPrefetch, (i + kPrefetch - 1) % kPrefetch);
      if (y >= first + 3) {
        next_row<false>(da, taps);
        if (in_image(y - 2)) accumulate<true>(da, taps, shared.dz[i % 2], column, lane);
        if (y - 3 >= block.begin) write_row(y - 3, (i + 1) % 4);
      }
      if (y >= first) {
        next_row<true>(z, taps);
        if (in_image(y)) accumulate<false>(z, taps, shared.a[(i + 1) % 2], column, lane);
        if (y > first + 1) gate_gradient(y - 1, i % kPrefetch, shared.dz[(i + 1) % 2]);
      }
      if (y <= block.end && in_image(y + 1)) activate(i % kPrefetch, shared.a[i % 2], (i + 1) % 4);
    }
  }
};

template <typename T>
__global__ __launch_bounds__(kGluThreads, 2) void glu_depthwise_backward_kernel(
    const __grid_constant__ GluDepthwiseParams<T> p, const __grid_constant__ GluGrid grid) {
  extern __shared__ uint4 memory[];
  Backward<T> backward{
      .p = p,
      .grid = grid,
      .shared = *reinterpret_cast<Shared<T>*>(memory),
      .block = glu_block(grid, p.height, kChannels),
      .lane = static_cast<int>(threadIdx.x),
      .column = static_cast<int>(threadIdx.y) * kGluColumns,
      .stride = int64_t{2} * p.channels,
      .taps = {},
      .z = {},
      .da = {},
  };
  backward.taps.load(p, backward.block.channel + backward.lane);
  backward.run();
}

}  // namespace

template <typename T>
void launch_glu_depthwise_backward(const GluDepthwiseParams<T>& p, cudaStream_t stream) {
  if (p.rows == 0 || p.height == 0 || p.width == 0 || p.channels == 0) return;
  GluGrid grid =
      glu_grid(p.rows, p.height, p.width, p.channels, kChannels, true, 4 * multiprocessors());
  grid.vector = pixels_aligned(p.x, p.channels) && pixels_aligned(p.grad, p.channels);
  const int64_t blocks = p.rows * grid.channel_tiles * grid.column_tiles * grid.segments;
  cudaFuncSetAttribute(glu_depthwise_backward_kernel<T>,
                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(sizeof(Shared<T>)));
  const dim3 threads(kGluLanes, grid.warps);
  glu_depthwise_backward_kernel<T>
      <<<static_cast<unsigned>(blocks), threads, sizeof(Shared<T>), stream>>>(p, grid);
}

template void launch_glu_depthwise_backward(const GluDepthwiseParams<float>&, cudaStream_t);
template void launch_glu_depthwise_backward(const GluDepthwiseParams<__nv_bfloat16>&, cudaStream_t);
template void launch_glu_depthwise_backward(const GluDepthwiseParams<__half>&, cudaStream_t);

}  // namespace mfd::cuda
