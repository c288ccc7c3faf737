#include "cpu/linear_attention.h"

#include "torch_utils.h"

namespace mfd {
namespace {

constexpr const char* kOp = "linear_attention";

// Calls f with the head width as a compile-time constant.
template <typename F>
void dispatch_width(int64_t width, const F& f) {
  switch (width) {
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 8:
      return f(std::integral_constant<int, 8>{});
    case 16:
      return f(std::integral_constant<int, 16>{});
    case 32:
      return f(std::integral_constant<int, 32>{});
    case 64:
      return f(std::integral_constant<int, 64>{});
    default:
      MFD_CHECK(kOp, false, "the head width must be a power of two from 4 to 64; got ", width);
  }
}

void check_heads(const Tensor& x, const char* name, const Tensor& q) {
  check_same_shape(kOp, x, name, q, "q");
  check_dtype(kOp, x, name, q.scalar_type());
  MFD_CHECK(kOp, x.dim() == 4, name, " must be [R, T, H, D]; got ", shape_text(x));
  MFD_CHECK(kOp, x.stride(3) == 1, name, " must have a contiguous last dimension; got stride ",
            x.stride(3));
}

template <typename T>
HeadView<T> view(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

ScalarType state_type(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            double eps) {
  check_heads(q, "q", q);
  check_heads(k, "k", q);
  check_heads(v, "v", q);
  const int64_t rows = q.size(0), tokens = q.size(1), heads = q.size(2), width = q.size(3);
  Tensor out = torch::stable::new_empty(q, {rows, tokens, heads * width});
  Tensor state = torch::stable::new_zeros(q, {rows, heads, width + 1, width}, state_type(q));
  if (out.numel() == 0) return {out, state};
  dispatch_cpu(kOp, q, [&](auto element) {
    using T = decltype(element);
    const LinearAttentionParams<T> params{
        .q = view<const T>(q),
        .k = view<const T>(k),
        .v = view<const T>(v),
        .out = {data_ptr<T>(out), tokens * heads * width, heads * width, width},
        .state = data_ptr<accumulate_t<T>>(state),
        .tokens = tokens,
        .heads = heads,
        .eps = static_cast<accumulate_t<T>>(eps),
    };
    dispatch_width(width, [&](auto d) {
      torch::stable::parallel_for(0, rows * heads, 1, [&](int64_t begin, int64_t end) {
        linear_attention_cpu<d()>(params, begin, end);
      });
    });
  });
  return {out, state};
}

// The gradients of q, k and v side by side, [R, T, 3, H, D].
Tensor linear_attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                 const Tensor& v, const Tensor& state, double eps) {
  check_heads(q, "q", q);
  check_heads(k, "k", q);
  check_heads(v, "v", q);
  check_contiguous(kOp, grad, "grad");
  check_contiguous(kOp, state, "state");
  check_dtype(kOp, grad, "grad", q.scalar_type());
  check_dtype(kOp, state, "state", state_type(q));
  const int64_t rows = q.size(0), tokens = q.size(1), heads = q.size(2), width = q.size(3);
  const int64_t token = heads * width;
  Tensor out = torch::stable::new_empty(q, {rows, tokens, 3, heads, width});
  if (out.numel() == 0) return out;
  dispatch_cpu(kOp, q, [&](auto element) {
    using T = decltype(element);
    const auto part = [&](int64_t i) {
      return HeadView<T>{data_ptr<T>(out) + i * token, 3 * tokens * token, 3 * token, width};
    };
    const LinearAttentionGradParams<T> params{
        .grad = {data_ptr<const T>(grad), tokens * token, token, width},
        .q = view<const T>(q),
        .k = view<const T>(k),
        .v = view<const T>(v),
        .grad_q = part(0),
        .grad_k = part(1),
        .grad_v = part(2),
        .state = data_ptr<accumulate_t<T>>(state),
        .tokens = tokens,
        .heads = heads,
        .eps = static_cast<accumulate_t<T>>(eps),
    };
    dispatch_width(width, [&](auto d) {
      torch::stable::parallel_for(0, rows * heads, 1, [&](int64_t begin, int64_t end) {
        linear_attention_grad_cpu<d()>(params, begin, end);
      });
    });
  });
  return out;
}

}  // namespace
}  // namespace mfd

STABLE_TORCH_LIBRARY_IMPL(mfd_fast, CPU, m) {
  m.impl("linear_attention", TORCH_BOX(&mfd::linear_attention));
  m.impl("_linear_attention_backward", TORCH_BOX(&mfd::linear_attention_backward));
}
