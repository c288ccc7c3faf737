#include "cpu/glu_depthwise.h"

#include "torch_utils.h"

#ifdef MFD_WITH_CUDA
#include "cuda/glu_depthwise.cuh"
#endif

namespace mfd {
namespace {

constexpr const char* kOp = "glu_depthwise";

void check(const Tensor& x, const Tensor& weight, const Tensor& bias,
           const std::optional<Tensor>& in_bias, int64_t height, int64_t width) {
  MFD_CHECK(kOp, x.dim() == 3 && x.size(1) == height * width && x.size(2) % 2 == 0,
            "x must be [R, height * width, 2C]; got ", shape_text(x), " with height ", height,
            " and width ", width);
  check_contiguous(kOp, x, "x");
  check_contiguous(kOp, weight, "weight");
  check_dtype(kOp, weight, "weight", x.scalar_type());
  MFD_CHECK(kOp, weight.numel() == 9 * x.size(2), "weight must be [2C, 1, 3, 3]; got ",
            shape_text(weight));
  const auto check_row = [&](const Tensor& row, const char* name) {
    check_contiguous(kOp, row, name);
    check_dtype(kOp, row, name, x.scalar_type());
    MFD_CHECK(kOp, row.numel() == x.size(2), name, " must be [2C]; got ", shape_text(row));
  };
  check_row(bias, "bias");
  if (in_bias) check_row(*in_bias, "in_bias");
}

void check_grad(const Tensor& grad, const Tensor& x) {
  check_contiguous(kOp, grad, "grad");
  check_dtype(kOp, grad, "grad", x.scalar_type());
  MFD_CHECK(kOp, 2 * grad.numel() == x.numel(), "grad must be [R, height * width, C]; got ",
            shape_text(grad));
}

struct Tensors {
  const Tensor &x, &weight, &bias;
  const std::optional<Tensor>& in_bias;
};

// The fields that Params<T> of the CPU and of CUDA share.
template <typename Params, typename T>
Params inputs(const Tensors& t, int64_t height, int64_t width) {
  Params params{};
  params.x = data_ptr<T>(t.x);
  params.weight = data_ptr<T>(t.weight);
  params.bias = data_ptr<T>(t.bias);
  params.in_bias = optional_ptr<T>(t.in_bias);
  params.height = height;
  params.width = width;
  params.channels = t.x.size(2) / 2;
  return params;
}

Tensor make_out(const Tensor& x) {
  return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2) / 2});
}

std::tuple<Tensor, Tensor> make_gradients(const Tensor& x, bool with_conv) {
  return {torch::stable::empty_like(x),
          with_conv ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0})};
}

template <typename T>
void run_cpu(const GluDepthwiseParams<T>& params, int64_t rows) {
  torch::stable::parallel_for(
      0, rows * glu_tiles(params.channels), 1,
      [&](int64_t begin, int64_t end) { glu_depthwise_cpu(params, begin, end); });
}

Tensor glu_depthwise(const Tensor& x, const Tensor& weight, const Tensor& bias,
                     const std::optional<Tensor>& in_bias, int64_t height, int64_t width) {
  check(x, weight, bias, in_bias, height, width);
  Tensor out = make_out(x);
  if (out.numel() == 0) return out;
  dispatch_cpu(kOp, x, [&](auto element) {
    using T = decltype(element);
    auto params = inputs<GluDepthwiseParams<T>, T>({x, weight, bias, in_bias}, height, width);
    params.out = data_ptr<T>(out);
    run_cpu(params, x.size(0));
  });
  return out;
}

std::tuple<Tensor, Tensor> glu_depthwise_backward(const Tensor& grad, const Tensor& x,
                                                  const Tensor& weight, const Tensor& bias,
                                                  const std::optional<Tensor>& in_bias,
                                                  int64_t height, int64_t width, bool with_conv) {
  check(x, weight, bias, in_bias, height, width);
  check_grad(grad, x);
  auto [grad_x, grad_conv] = make_gradients(x, with_conv);
  if (x.numel() == 0) return {grad_x, grad_conv};
  dispatch_cpu(kOp, x, [&, &grad_x = grad_x, &grad_conv = grad_conv](auto element) {
    using T = decltype(element);
    auto params = inputs<GluDepthwiseParams<T>, T>({x, weight, bias, in_bias}, height, width);
    params.grad = data_ptr<T>(grad);
    params.grad_x = data_ptr<T>(grad_x);
    params.grad_conv = with_conv ? data_ptr<T>(grad_conv) : nullptr;
    run_cpu(params, x.size(0));
  });
  return {grad_x, grad_conv};
}

#ifdef MFD_WITH_CUDA
Tensor glu_depthwise_cuda(const Tensor& x, const Tensor& weight, const Tensor& bias,
                          const std::optional<Tensor>& in_bias, int64_t height, int64_t width) {
  check(x, weight, bias, in_bias, height, width);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = make_out(x);
  if (out.numel() == 0) return out;
  dispatch_cuda(kOp, x, [&](auto element) {
    using T = decltype(element);
    auto params = inputs<cuda::GluDepthwiseParams<T>, T>({x, weight, bias, in_bias}, height, width);
    params.out = data_ptr<T>(out);
    params.rows = x.size(0);
    cuda::launch_glu_depthwise(params, current_stream(x));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<Tensor, Tensor> glu_depthwise_backward_cuda(const Tensor& grad, const Tensor& x,
                                                       const Tensor& weight, const Tensor& bias,
                                                       const std::optional<Tensor>& in_bias,
                                                       int64_t height, int64_t width,
                                                       bool with_conv) {
  check(x, weight, bias, in_bias, height, width);
  check_grad(grad, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  auto [grad_x, grad_conv] = make_gradients(x, with_conv);
  if (x.numel() == 0) return {grad_x, grad_conv};
  dispatch_cuda(kOp, x, [&, &grad_x = grad_x, &grad_conv = grad_conv](auto element) {
    using T = decltype(element);
    auto params = inputs<cuda::GluDepthwiseParams<T>, T>({x, weight, bias, in_bias}, height, width);
    params.grad = data_ptr<T>(grad);
    params.grad_x = data_ptr<T>(grad_x);
    params.grad_conv = with_conv ? data_ptr<T>(grad_conv) : nullptr;
    params.rows = x.size(0);
    cuda::launch_glu_depthwise_backward(params, current_stream(x));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_x, grad_conv};
}
#endif

}  // namespace
}  // namespace mfd

STABLE_TORCH_LIBRARY_IMPL(mfd_fast, CPU, m) {
  m.impl("glu_depthwise", TORCH_BOX(&mfd::glu_depthwise));
  m.impl("_glu_depthwise_backward", TORCH_BOX(&mfd::glu_depthwise_backward));
}
#ifdef MFD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mfd_fast, CUDA, m) {
  m.impl("_glu_depthwise_cuda", TORCH_BOX(&mfd::glu_depthwise_cuda));
  m.impl("_glu_depthwise_backward_cuda", TORCH_BOX(&mfd::glu_depthwise_backward_cuda));
}
#endif
