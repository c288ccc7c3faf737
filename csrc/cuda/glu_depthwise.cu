#include "cuda/glu_tile.cuh"

namespace mfd::cuda {
namespace {

constexpr int kStages = 3;  // rows of x in shared memory: one in use, two on their way

// Four bytes of channels to a lane: at 16 bits 36 weights and 48 sums, just what 128 registers
// hold.
template <typename T>
constexpr int kLaneChannels = 4 / sizeof(T);
template <typename T>
constexpr int kTileChannels = kGluLanes * kLaneChannels<T>;

template <typename T>
struct Shared {
  T x[kStages][2][kGluPadded][kTileChannels<T>];
  GluLine<kLaneChannels<T>> a[2];
};

template <typename T>
struct Forward {
  static constexpr int kVec = kLaneChannels<T>;
  static constexpr int kChannels = kTileChannels<T>;

  const GluDepthwiseParams<T>& p;
  const GluGrid& grid;
  Shared<T>& shared;
  const GluBlock block;
  const int lane, column;  // column: padded index to the left of the thread's first column
  const int64_t stride;
  GluTaps<kVec> taps;
  GluSums<kVec> sums = {};

  __device__ bool in_image(int y) const { return y >= 0 && y < p.height; }

  __device__ __forceinline__ void stage_row(int y, int slot) {
    if (y <= block.end && in_image(y)) {
      const T* row = p.x + (block.row * p.height + y) * p.width * stride + block.channel;
      for (int half = 0; half < 2; ++half)
        stage<kChannels>(&shared.x[slot][half][0][0], row + int64_t{half} * p.channels, stride,
                         block.column - 1, static_cast<int>(blockDim.y) * kGluColumns + 2, p.width,
                         p.channels - block.channel, grid.vector);
    }
    __pipeline_commit();
  }

  // SiLU of one pixel; zero outside the image.
  __device__ __forceinline__ void activate_column(int at, int slot, GluLine<kVec>& to) {
    const int image = block.column - 1 + at;
    Pack<float, kVec> a[2] = {};
    if (image >= 0 && image < p.width) {
      float x[2 * kVec], s[2 * kVec];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto pack =
            *reinterpret_cast<const Pack<T, kVec>*>(&shared.x[slot][half][at][lane * kVec]);
#pragma unroll
        for (int v = 0; v < kVec; ++v)
          x[half * kVec + v] = static_cast<float>(pack.value[v]) + taps.in_bias[half][v];
      }
      sigmoid<kGluPaired<T>>(x, s);
#pragma unroll
      for (int i = 0; i < 2 * kVec; ++i) a[i / kVec].value[i % kVec] = x[i] * s[i];
    }
    to[0][at][lane] = a[0];
    to[1][at][lane] = a[1];
  }

  __device__ __forceinline__ void activate(int slot, GluLine<kVec>& to) {
#pragma unroll
    for (int o = 0; o < kGluColumns; ++o) activate_column(column + 1 + o, slot, to);
    if (threadIdx.y == 0) activate_column(0, slot, to);
    if (threadIdx.y == blockDim.y - 1) activate_column(column + 1 + kGluColumns, slot, to);
  }

  __device__ __forceinline__ void write_row(int y) {
    float gate[kGluColumns * kVec], s[kGluColumns * kVec];
#pragma unroll
    for (int i = 0; i < kGluColumns * kVec; ++i) gate[i] = sums[0][i / kVec][1][i % kVec];
    sigmoid<kGluPaired<T>>(gate, s);
    const int channel = block.channel + lane * kVec;
#pragma unroll
    for (int o = 0; o < kGluColumns; ++o) {
      const int image = block.column + column + o;
      if (image >= p.width || channel >= p.channels) continue;
      float out[kVec];
#pragma unroll
      for (int v = 0; v < kVec; ++v)
        out[v] = sums[0][o][0][v] * gate[o * kVec + v] * s[o * kVec + v];
      T* to = p.out + ((block.row * p.height + y) * p.width + image) * p.channels + channel;
      if (grid.vector) {
        store<kVec>(to, out);  // 32 lanes side by side: whole sectors
      } else {
        for (int v = 0; v < kVec; ++v)
          if (channel + v < p.channels) to[v] = static_cast<T>(out[v]);
      }
    }
  }

  // Iteration y adds row y of activations while row y + 1 is activated and y + 3 is fetched: one
  // barrier.
  __device__ __forceinline__ void run() {
    const int first = block.begin - 1;
    stage_row(first, 0);
    stage_row(first + 1, 1);
#pragma unroll 1  // unrolled, it spills
    for (int i = 0; i <= block.end - first + 1; ++i) {
      const int y = first - 1 + i;
      __pipeline_wait_prior(1);
      __syncthreads();
      stage_row(y + 3, (i + 2) % kStages);
      if (y >= first) {
        next_row<true>(sums, taps);
        if (in_image(y)) accumulate<false>(sums, taps, shared.a[(i + 1) % 2], column, lane);
        if (y > block.begin) write_row(y - 1);
      }
      if (y < block.end && in_image(y + 1)) activate(i % kStages, shared.a[i % 2]);
    }
  }
};

template <typename T>
__global__ __launch_bounds__(kGluThreads, 2) void glu_depthwise_kernel(
    const __grid_constant__ GluDepthwiseParams<T> p, const __grid_constant__ GluGrid grid) {
  extern __shared__ uint4 memory[];
  Forward<T> forward{
      .p = p,
      .grid = grid,
      .shared = *reinterpret_cast<Shared<T>*>(memory),
      .block = glu_block(grid, p.height, kTileChannels<T>),
      .lane = static_cast<int>(threadIdx.x),
      .column = static_cast<int>(threadIdx.y) * kGluColumns,
      .stride = int64_t{2} * p.channels,
      .taps = {},
  };
  forward.taps.load(p, forward.block.channel + forward.lane * kLaneChannels<T>);
  forward.run();
}

}  // namespace

template <typename T>
void launch_glu_depthwise(const GluDepthwiseParams<T>& p, cudaStream_t stream) {
  if (p.rows == 0 || p.height == 0 || p.width == 0 || p.channels == 0) return;
  // Two blocks fit a multiprocessor; two waves of them even out the tail.
  GluGrid grid = glu_grid(p.rows, p.height, p.width, p.channels, kTileChannels<T>, false,
                          4 * multiprocessors());
  grid.vector = pixels_aligned(p.x, p.channels) && pixels_aligned(p.out, p.channels);
  const int64_t blocks = p.rows * grid.channel_tiles * grid.column_tiles * grid.segments;
  cudaFuncSetAttribute(glu_depthwise_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(sizeof(Shared<T>)));
  const dim3 threads(kGluLanes, grid.warps);
  glu_depthwise_kernel<T>
      <<<static_cast<unsigned>(blocks), threads, sizeof(Shared<T>), stream>>>(p, grid);
}

template void launch_glu_depthwise(const GluDepthwiseParams<float>&, cudaStream_t);
template void launch_glu_depthwise(const GluDepthwiseParams<__nv_bfloat16>&, cudaStream_t);
template void launch_glu_depthwise(const GluDepthwiseParams<__half>&, cudaStream_t);

}  // namespace mfd::cuda
