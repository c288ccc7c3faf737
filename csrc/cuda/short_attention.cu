#include "cuda/attention_tile.cuh"

namespace mfd::cuda {
namespace {

template <typename T>
__global__ __launch_bounds__(kAttentionThreads) void short_attention_kernel(
    const __grid_constant__ ShortAttentionParams<T> p, const __grid_constant__ AttentionGrid grid) {
  extern __shared__ uint4 memory[];
  const int tile = p.tokens * grid.chunks * grid.pairs;
  uint4 *const q = memory, *const k = q + tile, *const v = k + tile;

  for (int i = threadIdx.x; i < tile; i += blockDim.x) {
    const TilePlace at(p, grid, i, kVector<T>);
    fetch(q, p.q, at, p.width, grid.vector);
    fetch(k, p.k, at, p.width, grid.vector);
    fetch(v, p.v, at, p.width, grid.vector);
  }
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();

  const Owner own(p, grid);
  const auto slot = [&](int token, int chunk) {
    return (token * grid.chunks + chunk) * grid.pairs + own.pair;
  };
  float s[2][kMaxTokens] = {};
  for (int c = 0; c < grid.chunks; ++c) {
    const Chunk<T> q0(q[slot(own.token[0], c)]), q1(q[slot(own.token[1], c)]);
#pragma unroll
    for (int j = 0; j < kMaxTokens; ++j) {
      if (j >= p.tokens) break;
      const Chunk<T> key(k[slot(j, c)]);
      s[0][j] = dot(s[0][j], q0, key);
      s[1][j] = dot(s[1][j], q1, key);
    }
  }
  softmax(s, p, own);

  // The result takes the place of the queries that only this thread has read, and leaves from there
  // in the order of memory.
  for (int c = 0; c < grid.chunks; ++c) {
    Chunk<T> out[2];
#pragma unroll
    for (int j = 0; j < kMaxTokens; ++j) {
      if (j >= p.tokens) break;
      const Chunk<T> value(v[slot(j, c)]);
      out[0].add(s[0][j], value);
      out[1].add(s[1][j], value);
    }
    out[0].put(q[slot(own.token[0], c)], 1.0f);
    if (own.second) out[1].put(q[slot(own.token[1], c)], 1.0f);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tile; i += blockDim.x)
    write_back(q, p.out, TilePlace(p, grid, i, kVector<T>), p.width, grid.vector);
}

}  // namespace

template <typename T>
void launch_short_attention(const ShortAttentionParams<T>& p, cudaStream_t stream) {
  if (p.rows == 0 || p.heads == 0 || p.tokens == 0 || p.width == 0) return;
  const int chunks = static_cast<int>(ceil_div(p.width, kVector<T>));
  AttentionGrid grid =
      attention_grid(p.rows, p.tokens, p.heads, chunks, 3 * p.tokens * chunks * 16);
  grid.vector = heads_aligned(p.q, p.width) && heads_aligned(p.k, p.width) &&
                heads_aligned(p.v, p.width) && heads_aligned(p.out, p.width);
  const dim3 blocks(static_cast<unsigned>(grid.row_blocks),
                    static_cast<unsigned>(ceil_div(p.heads, grid.block_heads)));
  const int threads = grid.pairs * ((p.tokens + 1) / 2);
  short_attention_kernel<T><<<blocks, threads, grid.shared_bytes, stream>>>(p, grid);
}

template void launch_short_attention(const ShortAttentionParams<float>&, cudaStream_t);
template void launch_short_attention(const ShortAttentionParams<__nv_bfloat16>&, cudaStream_t);
template void launch_short_attention(const ShortAttentionParams<__half>&, cudaStream_t);

}  // namespace mfd::cuda
