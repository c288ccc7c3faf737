#include "cuda/attention_tile.cuh"

namespace mfd::cuda {
namespace {

// Scores and their gradients of all pairs, [query][key][pair], between the owners of queries and
// keys.
struct Square {
  float* base;
  int tokens, pairs;
  __device__ __forceinline__ float& at(int query, int key, int pair) const {
    return base[(query * tokens + key) * pairs + pair];
  }
};

template <typename T>
struct Tiles {
  uint4 *q, *k, *v, *grad;
  Square p, ds;
};

// P and dS of the owner's queries.
template <typename T>
__device__ __forceinline__ void scores(const ShortAttentionParams<T>& p, const AttentionGrid& grid,
                                       const Tiles<T>& tiles, const Owner& own) {
  float s[2][kMaxTokens] = {}, dp[2][kMaxTokens] = {};
  for (int c = 0; c < grid.chunks; ++c) {
    const int first = (own.token[0] * grid.chunks + c) * grid.pairs + own.pair;
    const int second = (own.token[1] * grid.chunks + c) * grid.pairs + own.pair;
    const Chunk<T> q0(tiles.q[first]), q1(tiles.q[second]);
    const Chunk<T> g0(tiles.grad[first]), g1(tiles.grad[second]);
#pragma unroll
    for (int j = 0; j < kMaxTokens; ++j) {
      if (j >= p.tokens) break;
      const int slot = (j * grid.chunks + c) * grid.pairs + own.pair;
      const Chunk<T> key(tiles.k[slot]);
      s[0][j] = dot(s[0][j], q0, key);
      s[1][j] = dot(s[1][j], q1, key);
      const Chunk<T> value(tiles.v[slot]);
      dp[0][j] = dot(dp[0][j], g0, value);
      dp[1][j] = dot(dp[1][j], g1, value);
    }
  }
  softmax(s, p, own);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float delta = 0.0f;
#pragma unroll
    for (int j = 0; j < kMaxTokens; ++j) delta = fmaf(s[i][j], dp[i][j], delta);
#pragma unroll
    for (int j = 0; j < kMaxTokens; ++j) {
      if (j >= p.tokens) break;
      tiles.p.at(own.token[i], j, own.pair) = s[i][j];
      tiles.ds.at(own.token[i], j, own.pair) = s[i][j] * (dp[i][j] - delta);
    }
  }
}

// The three gradients of the owner's tokens take the place of q, k and v, chunk by chunk: all
// threads have read a chunk before any writes it.
template <typename T>
__device__ __forceinline__ void gradients(const ShortAttentionParams<T>& p,
                                          const AttentionGrid& grid, const Tiles<T>& tiles,
                                          const Owner& own) {
  for (int c = 0; c < grid.chunks; ++c) {
    Chunk<T> dq[2], dk[2], dv[2];
#pragma unroll 4
    for (int t = 0; t < p.tokens; ++t) {
      const int slot = (t * grid.chunks + c) * grid.pairs + own.pair;
      const Chunk<T> key(tiles.k[slot]), query(tiles.q[slot]), grad(tiles.grad[slot]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        dq[i].add(tiles.ds.at(own.token[i], t, own.pair), key);
        dk[i].add(tiles.ds.at(t, own.token[i], own.pair), query);
        dv[i].add(tiles.p.at(t, own.token[i], own.pair), grad);
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i == 1 && !own.second) break;
      const int slot = (own.token[i] * grid.chunks + c) * grid.pairs + own.pair;
      dq[i].put(tiles.q[slot], p.scale);
      dk[i].put(tiles.k[slot], p.scale);
      dv[i].put(tiles.v[slot], 1.0f);
    }
  }
}

// The block's share of the gradient of the bias: dS summed over its rows, in order.
template <typename T>
__device__ __forceinline__ void bias_share(const ShortAttentionParams<T>& p,
                                           const AttentionGrid& grid, const Square& ds) {
  const int square = p.tokens * p.tokens;
  for (int i = threadIdx.x; i < grid.block_heads * square; i += blockDim.x) {
    const int in_head = i / square, head = blockIdx.y * grid.block_heads + in_head;
    if (head >= p.heads) continue;
    const float* column = ds.base + (i - in_head * square) * grid.pairs + in_head;
    float sum = 0.0f;
    for (int r = 0; r < grid.block_rows; ++r) sum += column[r * grid.block_heads];
    p.bias_partial[(int64_t{blockIdx.x} * p.heads + head) * square + (i - in_head * square)] = sum;
  }
}

template <typename T>
__global__ __launch_bounds__(kAttentionThreads) void short_attention_backward_kernel(
    const __grid_constant__ ShortAttentionParams<T> p, const __grid_constant__ AttentionGrid grid) {
  extern __shared__ uint4 memory[];
  const int tile = p.tokens * grid.chunks * grid.pairs;
  const int square = p.tokens * p.tokens * grid.pairs;
  float* const squares = reinterpret_cast<float*>(memory + 4 * tile);
  const Tiles<T> tiles{
      .q = memory,
      .k = memory + tile,
      .v = memory + 2 * tile,
      .grad = memory + 3 * tile,
      .p = {squares, p.tokens, grid.pairs},
      .ds = {squares + square, p.tokens, grid.pairs},
  };
  for (int i = threadIdx.x; i < tile; i += blockDim.x) {
    const TilePlace at(p, grid, i, kVector<T>);
    fetch(tiles.q, p.q, at, p.width, grid.vector);
    fetch(tiles.k, p.k, at, p.width, grid.vector);
    fetch(tiles.v, p.v, at, p.width, grid.vector);
    fetch(tiles.grad, p.grad, at, p.width, grid.vector);
  }
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();

  const Owner own(p, grid);
  scores(p, grid, tiles, own);
  __syncthreads();
  if (p.bias_partial != nullptr) bias_share(p, grid, tiles.ds);
  gradients(p, grid, tiles, own);
  __syncthreads();
  for (int i = threadIdx.x; i < tile; i += blockDim.x) {
    const TilePlace at(p, grid, i, kVector<T>);
    write_back(tiles.q, p.grad_q, at, p.width, grid.vector);
    write_back(tiles.k, p.grad_k, at, p.width, grid.vector);
    write_back(tiles.v, p.grad_v, at, p.width, grid.vector);
  }
}

// 32 columns by 32 walkers over the partial sums; a fixed tree adds the walkers.
constexpr int kSide = 32;

__global__ __launch_bounds__(kSide* kSide) void bias_sum_kernel(const float* partial, float* out,
                                                                int columns, int64_t blocks) {
  __shared__ float sums[kSide][kSide];
  const int column = blockIdx.x * kSide + threadIdx.x;
  float sum = 0.0f;
  if (column < columns)
    for (int64_t b = threadIdx.y; b < blocks; b += kSide) sum += partial[b * columns + column];
  sums[threadIdx.y][threadIdx.x] = sum;
  for (int half = kSide / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.y) < half)
      sums[threadIdx.y][threadIdx.x] += sums[threadIdx.y + half][threadIdx.x];
  }
  if (threadIdx.y == 0 && column < columns) out[column] = sums[0][threadIdx.x];
}

template <typename T>
AttentionGrid backward_grid(const ShortAttentionParams<T>& p) {
  const int chunks = static_cast<int>(ceil_div(p.width, kVector<T>));
  const int squares = 2 * p.tokens * p.tokens * static_cast<int>(sizeof(float));
  return attention_grid(p.rows, p.tokens, p.heads, chunks, 4 * p.tokens * chunks * 16 + squares);
}

}  // namespace

template <typename T>
int64_t short_attention_backward_blocks(const ShortAttentionParams<T>& p) {
  return backward_grid(p).row_blocks;
}

template <typename T>
void launch_short_attention_backward(const ShortAttentionParams<T>& p, cudaStream_t stream) {
  if (p.rows == 0 || p.heads == 0 || p.tokens == 0 || p.width == 0) return;
  AttentionGrid grid = backward_grid(p);
  grid.vector = heads_aligned(p.q, p.width) && heads_aligned(p.k, p.width) &&
                heads_aligned(p.v, p.width) && heads_aligned(p.grad, p.width) &&
                heads_aligned(p.grad_q, p.width) && heads_aligned(p.grad_k, p.width) &&
                heads_aligned(p.grad_v, p.width);
  const dim3 blocks(static_cast<unsigned>(grid.row_blocks),
                    static_cast<unsigned>(ceil_div(p.heads, grid.block_heads)));
  const int threads = grid.pairs * ((p.tokens + 1) / 2);
  short_attention_backward_kernel<T><<<blocks, threads, grid.shared_bytes, stream>>>(p, grid);
  if (p.bias_partial == nullptr) return;
  const int columns = p.heads * p.tokens * p.tokens;
  bias_sum_kernel<<<static_cast<unsigned>(ceil_div(columns, kSide)), dim3(kSide, kSide), 0,
                    stream>>>(p.bias_partial, p.grad_bias, columns, grid.row_blocks);
}

template int64_t short_attention_backward_blocks(const ShortAttentionParams<float>&);
template int64_t short_attention_backward_blocks(const ShortAttentionParams<__nv_bfloat16>&);
template int64_t short_attention_backward_blocks(const ShortAttentionParams<__half>&);
template void launch_short_attention_backward(const ShortAttentionParams<float>&, cudaStream_t);
template void launch_short_attention_backward(const ShortAttentionParams<__nv_bfloat16>&,
                                              cudaStream_t);
template void launch_short_attention_backward(const ShortAttentionParams<__half>&, cudaStream_t);

}  // namespace mfd::cuda
