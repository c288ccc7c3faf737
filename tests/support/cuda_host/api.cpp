// Entry points for ctypes: one for every operator and direction, with raw pointers.  Each returns
// what went wrong, or an empty string.  The sizes and pointers are those of the params structs.
#include "cuda/glu_depthwise.cuh"
#include "cuda/interpolate.cuh"
#include "cuda/mfd_loss.cuh"
#include "cuda/ode_step.cuh"
#include "cuda/short_attention.cuh"
#include "emulator.h"

#define MFD_API extern "C" __attribute__((visibility("default"))) const char*

using namespace mfd::cuda;

namespace {

std::string result;

// Calls f with a value of the type: 0 float, 1 bfloat16, 2 half.
template <typename F>
const char* dispatch(int type, F f) {
  emulator::failure.clear();
  if (type == 0) f(float{});
  if (type == 1) f(__nv_bfloat16{});
  if (type == 2) f(__half{});
  result = emulator::failure;
  return result.c_str();
}

// Pointers in the order of the params struct; null where the operator allows it.
struct Pointers {
  void** next;
  template <typename T>
  operator T*() {
    return static_cast<T*>(*next++);
  }
};

template <typename T>
GluDepthwiseParams<T> glu_params(void** tensors, const int64_t* sizes) {
  Pointers at{tensors};
  return {
      .x = at,
      .weight = at,
      .bias = at,
      .in_bias = at,
      .out = at,
      .grad = at,
      .grad_x = at,
      .grad_conv = at,
      .rows = sizes[0],
      .height = static_cast<int>(sizes[1]),
      .width = static_cast<int>(sizes[2]),
      .channels = static_cast<int>(sizes[3]),
  };
}

// sizes: rows, tokens, heads, width, strides of the bias (head, query, key).  q, k and v lie in one
// [rows, tokens, 3, heads, width] array, and so do their gradients; the output is merged as
// [rows, heads, tokens, width] (row major) or [rows, tokens, heads, width].
template <typename T>
ShortAttentionParams<T> attention_params(void** tensors, const int64_t* sizes, bool row_major,
                                         float scale) {
  const int64_t tokens = sizes[1], heads = sizes[2], width = sizes[3], model = heads * width;
  Pointers at{tensors};
  const T* const qkv = at;
  ShortAttentionParams<T> p{};
  const int64_t token = row_major ? width : model, head = row_major ? tokens * width : width;
  const auto part = [&](auto* base, int i) {
    return TokenView<std::remove_pointer_t<decltype(base)>>{base + i * model, 3 * tokens * model,
                                                            3 * model, width};
  };
  p.q = part(qkv, 0), p.k = part(qkv, 1), p.v = part(qkv, 2);
  p.bias = {at, sizes[4], sizes[5], sizes[6]};
  p.out = {at, tokens * model, token, head};
  p.grad = {at, tokens * model, token, head};
  T* const gradients = at;
  p.grad_q = part(gradients, 0), p.grad_k = part(gradients, 1), p.grad_v = part(gradients, 2);
  p.grad_bias = at;
  p.rows = sizes[0];
  p.tokens = static_cast<int>(tokens);
  p.heads = static_cast<int>(heads);
  p.width = static_cast<int>(width);
  p.scale = scale;
  return p;
}

}  // namespace

MFD_API configure(int multiprocessors, int descending) {
  emulator::multiprocessors = multiprocessors;
  emulator::descending = descending != 0;
  return "";
}

MFD_API glu_depthwise(int type, void** tensors, const int64_t* sizes) {
  return dispatch(type, [&](auto element) {
    launch_glu_depthwise(glu_params<decltype(element)>(tensors, sizes), nullptr);
  });
}

MFD_API glu_depthwise_backward(int type, void** tensors, const int64_t* sizes) {
  return dispatch(type, [&](auto element) {
    launch_glu_depthwise_backward(glu_params<decltype(element)>(tensors, sizes), nullptr);
  });
}

MFD_API short_attention(int type, void** tensors, const int64_t* sizes, int row_major,
                        float scale) {
  return dispatch(type, [&](auto element) {
    using T = decltype(element);
    launch_short_attention(attention_params<T>(tensors, sizes, row_major != 0, scale), nullptr);
  });
}

MFD_API short_attention_backward(int type, void** tensors, const int64_t* sizes, int row_major,
                                 float scale) {
  return dispatch(type, [&](auto element) {
    using T = decltype(element);
    auto p = attention_params<T>(tensors, sizes, row_major != 0, scale);
    std::vector<float> partial;
    if (p.grad_bias != nullptr) {
      partial.assign(short_attention_backward_blocks(p) * p.heads * p.tokens * p.tokens, NAN);
      p.bias_partial = partial.data();
    }
    launch_short_attention_backward(p, nullptr);
  });
}

MFD_API interpolate(int type, void** tensors, const int64_t* sizes) {
  return dispatch(type, [&](auto element) {
    Pointers at{tensors};
    const InterpolateParams<decltype(element)> p{
        .x0 = at,
        .noise = at,
        .t = at,
        .x_t = at,
        .target = at,
        .rows = sizes[0],
        .n = sizes[1],
    };
    launch_interpolate(p, nullptr);
  });
}

MFD_API ode_step(int type, void** tensors, const int64_t* sizes, float guidance) {
  return dispatch(type, [&](auto element) {
    Pointers at{tensors};
    const OdeStepParams<decltype(element)> p{
        .x = at,
        .v = at,
        .history = at,
        .coef = at,
        .input = at,
        .guidance = guidance,
        .guided = sizes[2] == sizes[1] + 1,
        .batch = sizes[0],
        .trajectories = sizes[1],
        .lanes = sizes[2],
        .n = sizes[3],
    };
    launch_ode_step(p, nullptr);
  });
}

// sizes: rows, n, row strides of the two ends.
MFD_API mfd_loss(int type, void** tensors, const int64_t* sizes) {
  return dispatch(type, [&](auto element) {
    using T = decltype(element);
    const int64_t rows = sizes[0], n = sizes[1], blocks = mfd_loss_blocks<T>(n);
    std::vector<float> partial(2 * rows * blocks, NAN);
    Pointers at{tensors};
    const MfdLossParams<T> p{
        .x = at,
        .end_teacher = at,
        .end_aux = at,
        .grad = at,
        .stride_teacher = sizes[2],
        .stride_aux = sizes[3],
        .sums = {.dots = partial.data(),
                 .squares = partial.data() + rows * blocks,
                 .span = at,
                 .weight = at,
                 .loss = at,
                 .distance = at,
                 .rows = rows,
                 .n = n,
                 .blocks = blocks},
    };
    launch_mfd_loss(p, nullptr);
  });
}
