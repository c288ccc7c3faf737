#include "cpu/short_attention.h"

#include "torch_utils.h"

#ifdef MFD_WITH_CUDA
#include "cuda/short_attention.cuh"
#endif

namespace mfd {
namespace {

constexpr const char* kOp = "short_attention";
using Bias = std::optional<Tensor>;

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Bias& bias) {
  const auto check_heads = [&](const Tensor& x, const char* name) {
    check_same_shape(kOp, x, name, q, "q");
    check_dtype(kOp, x, name, q.scalar_type());
    MFD_CHECK(kOp, x.dim() == 4 && x.size(1) <= kMaxTokens && x.size(3) <= kMaxWidth, name,
              " must be [N, T <= 16, H, D <= 64]; got ", shape_text(x));
    MFD_CHECK(kOp, x.stride(3) == 1 || x.size(3) == 1, name,
              " must have a contiguous last dimension; got stride ", x.stride(3));
  };
  check_heads(q, "q");
  check_heads(k, "k");
  check_heads(v, "v");
  if (!bias) return;
  check_dtype(kOp, *bias, "bias", wide_type(q));
  MFD_CHECK(kOp,
            bias->dim() == 3 && bias->size(0) == q.size(2) && bias->size(1) == q.size(1) &&
                bias->size(2) == q.size(1),
            "bias must be [H, T, T]; got ", shape_text(*bias));
}

void check_grad(const Tensor& grad, const Tensor& q) {
  check_contiguous(kOp, grad, "grad");
  check_dtype(kOp, grad, "grad", q.scalar_type());
  MFD_CHECK(kOp, grad.numel() == q.numel(), "grad must be [N, T, H D]; got ", shape_text(grad));
}

// The views of the CPU and of CUDA have the same fields.
template <typename View>
View view(const Tensor& x) {
  return {static_cast<decltype(View::base)>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// The merged heads [N, T, H D]: the normal merge has heads inside tokens, the row-major one tokens
// inside heads.
template <typename View>
View merged(const Tensor& x, const Tensor& q, bool row_major) {
  const int64_t tokens = q.size(1), heads = q.size(2), width = q.size(3);
  return {static_cast<decltype(View::base)>(x.data_ptr()), tokens * heads * width,
          row_major ? width : heads * width, row_major ? tokens * width : width};
}

// Gradient i of [N, T, 3, H, D].
template <typename View>
View part(const Tensor& x, int64_t i) {
  return {static_cast<decltype(View::base)>(x.data_ptr()) + i * x.stride(2), x.stride(0),
          x.stride(1), x.stride(3)};
}

template <typename Params>
Params inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Bias& bias, double scale) {
  Params params{};
  params.q = view<decltype(params.q)>(q);
  params.k = view<decltype(params.k)>(k);
  params.v = view<decltype(params.v)>(v);
  if (bias) params.bias = view<decltype(params.bias)>(*bias);
  params.rows = q.size(0);
  params.tokens = q.size(1);
  params.heads = q.size(2);
  params.width = q.size(3);
  params.scale = scale;
  return params;
}

// Sets the fields of the backward.
template <typename Params>
void gradients(Params& params, const Tensor& grad, const Tensor& q, bool row_major,
               const Tensor& grad_qkv) {
  params.grad = merged<decltype(params.grad)>(grad, q, row_major);
  params.grad_q = part<decltype(params.grad_q)>(grad_qkv, 0);
  params.grad_k = part<decltype(params.grad_k)>(grad_qkv, 1);
  params.grad_v = part<decltype(params.grad_v)>(grad_qkv, 2);
}

Tensor make_out(const Tensor& q) {
  return torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2) * q.size(3)});
}

// The gradients of q, k and v side by side, [N, T, 3, H, D], and that of the bias, [H, T, T] or
// [0].
std::tuple<Tensor, Tensor> make_gradients(const Tensor& q, bool with_bias) {
  const int64_t tokens = q.size(1), heads = q.size(2);
  return {torch::stable::new_empty(q, {q.size(0), tokens, 3, heads, q.size(3)}),
          with_bias ? torch::stable::new_zeros(q, {heads, tokens, tokens}, wide_type(q))
                    : torch::stable::new_empty(q, {0}, wide_type(q))};
}

Tensor short_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Bias& bias,
                       bool row_major, double scale) {
  check(q, k, v, bias);
  Tensor out = make_out(q);
  if (out.numel() == 0) return out;
  dispatch_cpu(kOp, q, [&](auto element) {
    using T = decltype(element);
    auto params = inputs<ShortAttentionParams<T>>(q, k, v, bias, scale);
    params.out = merged<TokenView<T>>(out, q, row_major);
    constexpr int64_t kPairs = 64;  // some 20 us of work
    torch::stable::parallel_for(
        0, params.rows * params.heads, kPairs,
        [&](int64_t begin, int64_t end) { short_attention_cpu(params, begin, end); });
  });
  return out;
}

// Partial sums over rows -> [heads, tokens, tokens], in the order of the tasks.
template <typename A>
void reduce_bias(const std::vector<double>& partial, const Tensor& out) {
  const int64_t n = out.numel(), total = static_cast<int64_t>(partial.size());
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0.0;
    for (int64_t at = i; at < total; at += n) sum += partial[at];
    data_ptr<A>(out)[i] = static_cast<A>(sum);
  }
}

std::tuple<Tensor, Tensor> short_attention_backward(const Tensor& grad, const Tensor& q,
                                                    const Tensor& k, const Tensor& v,
                                                    const Bias& bias, bool row_major, double scale,
                                                    bool with_bias) {
  check(q, k, v, bias);
  check_grad(grad, q);
  auto [grad_qkv, grad_bias] = make_gradients(q, with_bias);
  if (grad_qkv.numel() == 0) return {grad_qkv, grad_bias};
  dispatch_cpu(kOp, q, [&, &grad_qkv = grad_qkv, &grad_bias = grad_bias](auto element) {
    using T = decltype(element);
    auto params = inputs<ShortAttentionParams<T>>(q, k, v, bias, scale);
    gradients(params, grad, q, row_major, grad_qkv);
    const int64_t tasks = (params.rows + kAttentionRows - 1) / kAttentionRows;
    std::vector<double> partial(with_bias ? tasks * grad_bias.numel() : 0, 0.0);
    params.grad_bias = with_bias ? partial.data() : nullptr;
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      short_attention_grad_cpu(params, begin, end);
    });
    if (with_bias) reduce_bias<accumulate_t<T>>(partial, grad_bias);
  });
  return {grad_qkv, grad_bias};
}

#ifdef MFD_WITH_CUDA
Tensor short_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Bias& bias,
                            bool row_major, double scale) {
  check(q, k, v, bias);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor out = make_out(q);
  if (out.numel() == 0) return out;
  dispatch_cuda(kOp, q, [&](auto element) {
    using T = decltype(element);
    auto params = inputs<cuda::ShortAttentionParams<T>>(q, k, v, bias, scale);
    params.out = merged<cuda::TokenView<T>>(out, q, row_major);
    cuda::launch_short_attention(params, current_stream(q));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<Tensor, Tensor> short_attention_backward_cuda(const Tensor& grad, const Tensor& q,
                                                         const Tensor& k, const Tensor& v,
                                                         const Bias& bias, bool row_major,
                                                         double scale, bool with_bias) {
  check(q, k, v, bias);
  check_grad(grad, q);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  auto [grad_qkv, grad_bias] = make_gradients(q, with_bias);
  if (grad_qkv.numel() == 0) return {grad_qkv, grad_bias};
  dispatch_cuda(kOp, q, [&, &grad_qkv = grad_qkv, &grad_bias = grad_bias](auto element) {
    using T = decltype(element);
    auto params = inputs<cuda::ShortAttentionParams<T>>(q, k, v, bias, scale);
    gradients(params, grad, q, row_major, grad_qkv);
    const int64_t blocks = with_bias ? cuda::short_attention_backward_blocks(params) : 0;
    Tensor partial = torch::stable::new_empty(q, {blocks * grad_bias.numel()}, ScalarType::Float);
    params.bias_partial = with_bias ? data_ptr<float>(partial) : nullptr;
    params.grad_bias = with_bias ? data_ptr<float>(grad_bias) : nullptr;
    cuda::launch_short_attention_backward(params, current_stream(q));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_qkv, grad_bias};
}
#endif

}  // namespace
}  // namespace mfd

STABLE_TORCH_LIBRARY_IMPL(mfd_fast, CPU, m) {
  m.impl("short_attention", TORCH_BOX(&mfd::short_attention));
  m.impl("_short_attention_backward", TORCH_BOX(&mfd::short_attention_backward));
}
#ifdef MFD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mfd_fast, CUDA, m) {
  m.impl("_short_attention_cuda", TORCH_BOX(&mfd::short_attention_cuda));
  m.impl("_short_attention_backward_cuda", TORCH_BOX(&mfd::short_attention_backward_cuda));
}
#endif
