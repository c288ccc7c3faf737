#pragma once
// What the two directions of the short attention share.
//
// A block holds `pairs` (row, head) pairs, heads inside rows, in shared memory in their own type:
// chunk c (16 bytes) of token t of pair p lies at [t][c][p], so that threads of neighbouring pairs
// read neighbouring chunks.  Thread (p, s) owns tokens 2 s and 2 s + 1 of pair p: every chunk that
// it reads serves both.
#include <cuda_pipeline.h>

#include <algorithm>

#include "cuda/short_attention.cuh"
#include "cuda/sigmoid.cuh"
#include "cuda/vector.cuh"

namespace mfd::cuda {

// Shared memory that a block may have without asking, and its most threads: 32 pairs by 8 token
// pairs.
constexpr int kAttentionBytes = 48 * 1024;
constexpr int kAttentionPairs = 32;
constexpr int kAttentionThreads = kAttentionPairs * kMaxTokens / 2;

// n / d for n d < 2^32.
struct Divisor {
  unsigned d, inverse;  // ceil(2^32 / d), or 0 for 1
  explicit Divisor(int64_t by)
      : d(static_cast<unsigned>(by)),
        inverse(d == 1 ? 0 : static_cast<unsigned>(((1ull << 32) + d - 1) / d)) {}
  __device__ __forceinline__ unsigned divide(unsigned n) const {
    return inverse == 0 ? n : __umulhi(n, inverse);
  }
};

struct AttentionGrid {
  int block_rows, block_heads;  // of a block
  int pairs;                    // their product
  int chunks;                   // of 16 bytes in a head
  int64_t row_blocks;
  Divisor by_chunks, by_heads, by_tokens;
  int shared_bytes;
  bool vector;  // every head starts at a multiple of 16 bytes and is whole chunks long
};

// As many pairs, a power of two at most, as `bytes_per_pair` lets into shared memory.
inline AttentionGrid attention_grid(int64_t rows, int tokens, int heads, int chunks,
                                    int bytes_per_pair) {
  int limit = kAttentionPairs;
  while (limit > 1 && limit * bytes_per_pair > kAttentionBytes) limit /= 2;
  const int block_heads = std::min(heads, limit);
  const int block_rows = limit / block_heads;
  return {
      .block_rows = block_rows,
      .block_heads = block_heads,
      .pairs = block_rows * block_heads,
      .chunks = chunks,
      .row_blocks = ceil_div(rows, block_rows),
      .by_chunks = Divisor(chunks),
      .by_heads = Divisor(block_heads),
      .by_tokens = Divisor(tokens),
      .shared_bytes = block_rows * block_heads * bytes_per_pair,
      .vector = false,
  };
}

template <typename T>
bool heads_aligned(const TokenView<T>& x, int width) {
  constexpr int kN = kVector<T>;
  return reinterpret_cast<uintptr_t>(x.base) % 16 == 0 && width % kN == 0 && x.row % kN == 0 &&
         x.token % kN == 0 && x.head % kN == 0;
}

// Where chunk i of a block's tile comes from: chunks inside heads inside tokens inside rows, so
// that neighbouring threads read neighbouring memory.
struct TilePlace {
  int slot;  // in shared memory
  int64_t row;
  int token, head, element;
  bool inside;

  template <typename Params>
  __device__ __forceinline__ TilePlace(const Params& p, const AttentionGrid& grid, unsigned i,
                                       int elements) {
    const unsigned at_head = grid.by_chunks.divide(i), chunk = i - at_head * grid.chunks;
    const unsigned at_token = grid.by_heads.divide(at_head);
    const unsigned in_head = at_head - at_token * grid.block_heads;
    const unsigned in_row = grid.by_tokens.divide(at_token);
    token = static_cast<int>(at_token - in_row * p.tokens);
    slot = (token * grid.chunks + chunk) * grid.pairs + in_row * grid.block_heads + in_head;
    row = int64_t{blockIdx.x} * grid.block_rows + in_row;
    head = blockIdx.y * grid.block_heads + in_head;
    element = chunk * elements;
    inside = row < p.rows && head < p.heads;
  }
};

template <typename T>
__device__ __forceinline__ T* address(const TokenView<T>& x, const TilePlace& at) {
  return x.base + at.row * x.row + at.token * x.token + at.head * x.head + at.element;
}

// Starts copying one chunk to shared memory; zeros past the last row, head or channel.
template <typename T>
__device__ __forceinline__ void fetch(uint4* tile, const TokenView<const T>& x, const TilePlace& at,
                                      int width, bool vector) {
  uint4* to = tile + at.slot;
  if (!at.inside) {
    *to = uint4{0, 0, 0, 0};
  } else if (vector) {
    __pipeline_memcpy_async(to, address(x, at), 16);
  } else {
    Pack<T, kVector<T>> pack;
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j)
      pack.value[j] = at.element + j < width ? address(x, at)[j] : static_cast<T>(0.0f);
    *reinterpret_cast<Pack<T, kVector<T>>*>(to) = pack;
  }
}

template <typename T>
__device__ __forceinline__ void write_back(const uint4* tile, const TokenView<T>& x,
                                           const TilePlace& at, int width, bool vector) {
  if (!at.inside) return;
  const uint4 raw = tile[at.slot];
  if (vector) {
    *reinterpret_cast<uint4*>(address(x, at)) = raw;
  } else {
    const auto& pack = reinterpret_cast<const Pack<T, kVector<T>>&>(raw);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j)
      if (at.element + j < width) address(x, at)[j] = pack.value[j];
  }
}

// A chunk of shared memory as floats, and back.
template <typename T>
struct Chunk {
  float value[kVector<T>];
  __device__ __forceinline__ explicit Chunk(const uint4& raw) {
    load<kVector<T>>(reinterpret_cast<const T*>(&raw), value);
  }
  __device__ __forceinline__ Chunk() {
#pragma unroll
    for (float& x : value) x = 0.0f;
  }
  __device__ __forceinline__ void add(float weight, const Chunk& x) {
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) value[j] = fmaf(weight, x.value[j], value[j]);
  }
  __device__ __forceinline__ void put(uint4& raw, float scale) const {
    float scaled[kVector<T>];
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) scaled[j] = scale * value[j];
    store<kVector<T>>(reinterpret_cast<T*>(&raw), scaled);
  }
};

template <typename T>
__device__ __forceinline__ float dot(float sum, const Chunk<T>& x, const Chunk<T>& y) {
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) sum = fmaf(x.value[j], y.value[j], sum);
  return sum;
}

// Which tokens a thread owns.  With an odd number of tokens the last thread owns one of them twice.
struct Owner {
  int pair, head;
  int token[2];
  bool second;  // token[1] is not a repetition

  template <typename Params>
  __device__ __forceinline__ Owner(const Params& p, const AttentionGrid& grid) {
    const int slot = threadIdx.x / grid.pairs;
    pair = threadIdx.x - slot * grid.pairs;
    head = blockIdx.y * grid.block_heads + pair % grid.block_heads;
    token[0] = 2 * slot;
    second = token[0] + 1 < p.tokens;
    token[1] = second ? token[0] + 1 : token[0];
  }
};

// Scores [2][kMaxTokens] of the owner's queries -> probabilities; the scale and the bias are
// applied here.
template <typename Params>
__device__ __forceinline__ void softmax(float (&s)[2][kMaxTokens], const Params& p,
                                        const Owner& own) {
  const float* bias =
      p.bias.base && own.head < p.heads ? p.bias.base + own.head * p.bias.head : nullptr;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = -INFINITY, total = 0.0f;
#pragma unroll
    for (int j = 0; j < kMaxTokens; ++j) {
      if (j >= p.tokens) break;
      s[i][j] *= p.scale;
      if (bias != nullptr) s[i][j] += bias[own.token[i] * p.bias.query + j * p.bias.key];
      top = fmaxf(top, s[i][j]);
    }
#pragma unroll
    for (int j = 0; j < kMaxTokens; ++j) {
      if (j >= p.tokens) break;
      s[i][j] = fast_exp2(kLog2E * (s[i][j] - top));
      total += s[i][j];
    }
    const float inverse = fast_reciprocal(total);
#pragma unroll
    for (int j = 0; j < kMaxTokens; ++j) s[i][j] = j < p.tokens ? s[i][j] * inverse : 0.0f;
  }
}

}  // namespace mfd::cuda
