#pragma once
// What the two directions of the depthwise unit share: how an image is cut into blocks, and how one
// row of a block's pixels gets into shared memory and into registers.
//
// A block is 32 lanes of kVec channels (in both halves) by up to 8 warps of 4 columns, and walks
// down some rows of the image.  A thread keeps its 3x3 weights and the sums of three output rows in
// registers: every row of activations is read from shared memory once and added to all three.
#include <cuda_pipeline.h>

#include <algorithm>

#include "cuda/glu_depthwise.cuh"
#include "cuda/sigmoid.cuh"
#include "cuda/vector.cuh"

namespace mfd::cuda {

constexpr int kGluLanes = 32;
constexpr int kGluWarps = 8;
constexpr int kGluColumns = 4;                     // of one thread
constexpr int kGluSpan = kGluWarps * kGluColumns;  // convolved columns of a block
constexpr int kGluPadded = kGluSpan + 2;           // columns of activations they need
constexpr int kGluThreads = kGluLanes * kGluWarps;

// 16-bit types are limited by the special-function unit, float by memory and accuracy.
template <typename T>
constexpr bool kGluPaired = sizeof(T) == 2;

// How the images are cut.  With `halo` neighbouring blocks overlap by two columns (the backward
// convolves twice); an image of at most kGluSpan columns is not cut.
struct GluGrid {
  int channel_tiles, column_tiles, segments;
  int halo, segment_rows, warps;
  bool vector;  // every pixel starts at a multiple of 16 bytes
};

struct GluBlock {
  int64_t row;     // sample
  int channel;     // first channel of either half
  int column;      // first convolved column; may be -1
  int begin, end;  // image rows
};

__device__ __forceinline__ GluBlock glu_block(const GluGrid& grid, int height,
                                              int channels_per_tile) {
  int64_t at = blockIdx.x;
  GluBlock block;
  block.channel = static_cast<int>(at % grid.channel_tiles) * channels_per_tile;
  at /= grid.channel_tiles;
  block.column = static_cast<int>(at % grid.column_tiles) * (kGluSpan - 2 * grid.halo) - grid.halo;
  at /= grid.column_tiles;
  block.begin = static_cast<int>(at % grid.segments) * grid.segment_rows;
  block.end = min(block.begin + grid.segment_rows, height);
  block.row = at / grid.segments;
  return block;
}

// `blocks_wanted` blocks fill the device; rather less than 8 rows, whose two halo rows cost a
// quarter.
inline GluGrid glu_grid(int64_t rows, int height, int width, int channels, int channels_per_tile,
                        bool with_halo, int64_t blocks_wanted) {
  GluGrid grid{};
  grid.channel_tiles = static_cast<int>(ceil_div(channels, channels_per_tile));
  grid.halo = with_halo && width > kGluSpan ? 1 : 0;
  grid.column_tiles = static_cast<int>(ceil_div(width, kGluSpan - 2 * grid.halo));
  grid.warps = static_cast<int>(std::min<int64_t>(ceil_div(width, kGluColumns), kGluWarps));
  const int64_t columns = rows * grid.channel_tiles * grid.column_tiles;
  grid.segment_rows = height;
  grid.segments = 1;
  while (columns * grid.segments < blocks_wanted && grid.segment_rows > 8) {
    grid.segment_rows = (grid.segment_rows + 1) / 2;
    grid.segments = static_cast<int>(ceil_div(height, grid.segment_rows));
  }
  return grid;
}

inline int64_t multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

template <typename T>
bool pixels_aligned(const T* p, int channels) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && channels % kVector<T> == 0;
}

// Starts copying columns [first, first + count) of one image row, kChannels channels of each, to
// slot [count][kChannels].  What lies outside the image or past the last chunk is left as it is; a
// last chunk that is not whole ends in zeros (its neighbours may share a reciprocal with it).
template <int kChannels, typename T>
__device__ __forceinline__ void stage(T* slot, const T* row, int64_t stride, int first, int count,
                                      int width, int channels, bool vector) {
  constexpr int kChunks = kChannels / kVector<T>;
  const int threads = blockDim.x * blockDim.y;
  for (int i = threadIdx.y * kGluLanes + threadIdx.x; i < count * kChunks; i += threads) {
    const int column = i / kChunks, at = i % kChunks * kVector<T>;
    const int image = first + column;
    if (image < 0 || image >= width || at >= channels) continue;
    T* to = slot + column * kChannels + at;
    const T* from = row + image * stride + at;
    if (vector) {
      __pipeline_memcpy_async(to, from, 16);
    } else {
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j)
        to[j] = at + j < channels ? from[j] : static_cast<T>(0.0f);
    }
  }
}

// The weights of one lane, [row][column][half][channel]; zero past the last channel.
template <int kVec>
struct GluTaps {
  float w[3][3][2][kVec];
  float bias[2][kVec];
  float in_bias[2][kVec];

  template <typename T>
  __device__ __forceinline__ void load(const GluDepthwiseParams<T>& p, int first) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        const bool inside = first + v < p.channels;
        const int64_t channel = inside ? int64_t{half} * p.channels + first + v : 0;
        const float keep = inside ? 1.0f : 0.0f;
        bias[half][v] = keep * static_cast<float>(p.bias[channel]);
        in_bias[half][v] = p.in_bias ? keep * static_cast<float>(p.in_bias[channel]) : 0.0f;
#pragma unroll
        for (int tap = 0; tap < 9; ++tap)
          w[tap / 3][tap % 3][half][v] = keep * static_cast<float>(p.weight[channel * 9 + tap]);
      }
  }
};

// The sums of three rows by kGluColumns columns.
template <int kVec>
using GluSums = float[3][kGluColumns][2][kVec];

// One row of activations or gradients in shared memory, [half][column][lane].
template <int kVec>
using GluLine = Pack<float, kVec>[2][kGluPadded][kGluLanes];

// Adds a row of `line` to the rows above it, beside it and below it.  Transposed: with the filter
// mirrored.  `column` is the padded index to the left of the thread's first column.
template <bool kTransposed, int kVec>
__device__ __forceinline__ void accumulate(GluSums<kVec>& sums, const GluTaps<kVec>& taps,
                                           const GluLine<kVec>& line, int column, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int k = 0; k < kGluColumns + 2; ++k) {
      const Pack<float, kVec> a = line[half][column + k][lane];
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        const int o = k - j;
        if (o < 0 || o >= kGluColumns) continue;
#pragma unroll
        for (int i = 0; i < 3; ++i)
#pragma unroll
          for (int v = 0; v < kVec; ++v) {
            const float w = kTransposed ? taps.w[i][2 - j][half][v] : taps.w[2 - i][j][half][v];
            sums[i][o][half][v] = fmaf(w, a.value[v], sums[i][o][half][v]);
          }
      }
    }
}

// Before a row is added: drops the finished first sum and starts a new last one at the bias or at
// zero. (Before, so that the copies melt into the first additions.)
template <bool kBias, int kVec>
__device__ __forceinline__ void next_row(GluSums<kVec>& sums, const GluTaps<kVec>& taps) {
#pragma unroll
  for (int o = 0; o < kGluColumns; ++o)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        sums[0][o][half][v] = sums[1][o][half][v];
        sums[1][o][half][v] = sums[2][o][half][v];
        sums[2][o][half][v] = kBias ? taps.bias[half][v] : 0.0f;
      }
}

}  // namespace mfd::cuda
