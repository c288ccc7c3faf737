#pragma once
// out = softmax(scale q k^T + bias) v within each (row, head), for at most kMaxTokens tokens.
// q, k, v [rows, tokens, heads, width] with free strides, bias [heads, tokens, tokens].
//
// Traffic in elements per (row, token): read 3 heads * width, write as much as one of them;
// backward read 4, write 3 (with the gradient of the bias 4 tokens^2 bytes more per block and
// head).
#include <cuda_runtime.h>

#include <cstdint>

namespace mfd::cuda {

constexpr int kMaxTokens = 16;

// [rows, tokens, heads, width] with a contiguous last dimension; strides in elements.
template <typename T>
struct TokenView {
  T* base;
  int64_t row, token, head;
};

struct BiasView {
  const float* base;  // or null
  int64_t head, query, key;
};

template <typename T>
struct ShortAttentionParams {
  TokenView<const T> q, k, v;
  BiasView bias;
  TokenView<T> out;         // forward
  TokenView<const T> grad;  // backward: the gradient at out
  TokenView<T> grad_q, grad_k, grad_v;
  float* bias_partial;  // backward: [blocks, heads, tokens, tokens]; null: no gradient of the bias
  float* grad_bias;     // backward: [heads, tokens, tokens]
  int64_t rows;
  int tokens, heads, width;
  float scale;
};

template <typename T>
void launch_short_attention(const ShortAttentionParams<T>& params, cudaStream_t stream);

// The blocks over rows that `bias_partial` has to hold.
template <typename T>
int64_t short_attention_backward_blocks(const ShortAttentionParams<T>& params);

template <typename T>
void launch_short_attention_backward(const ShortAttentionParams<T>& params, cudaStream_t stream);

}  // namespace mfd::cuda
