#include "cpu/mfd_loss.h"

#include <cmath>
#include <vector>

#include "torch_utils.h"

#ifdef MFD_WITH_CUDA
#include "cuda/mfd_loss.cuh"
#endif

namespace mfd {
namespace {

constexpr const char* op = "mfd_loss";

struct Outputs {
  Tensor loss, distance, grad;
};

void check(const Tensor& x, const Tensor& end_teacher, const Tensor& end_aux, const Tensor& span,
           const std::optional<Tensor>& weight) {
  check_contiguous(op, x, "x");
  check_same_shape(op, end_teacher, "end_teacher", x, "x");
  check_same_shape(op, end_aux, "end_aux", x, "x");
  check_dtype(op, end_teacher, "end_teacher", x.scalar_type());
  check_dtype(op, end_aux, "end_aux", x.scalar_type());
  check_dtype(op, span, "span", wide_type(x));
  check_contiguous(op, span, "span");
  if (weight) check_dtype(op, *weight, "weight", wide_type(x));
  if (weight) check_contiguous(op, *weight, "weight");
}

Outputs make_outputs(const Tensor& x, ScalarType sum_type) {
  return {.loss = torch::stable::new_empty(x, {}, sum_type),
          .distance = torch::stable::new_empty(x, {x.size(0)}, sum_type),
          .grad = torch::stable::empty_like(x)};
}

std::tuple<Tensor, Tensor, Tensor> zero_sums(const Outputs& out) {
  Tensor loss = out.loss, distance = out.distance;
  torch::stable::zero_(loss);
  torch::stable::zero_(distance);
  return {loss, distance, out.grad};
}

// Adds the partial sums of each row in order: the same result on any number of threads.
template <typename T, typename A = accumulate_t<T>>
void reduce(const MfdLossParams<T>& p, int64_t rows, A* loss, A* distance) {
  double total = 0.0;
  for (int64_t row = 0, task = 0; row < rows; ++row) {
    double square = 0.0;
    for (int64_t i = 0; i < p.blocks; ++i, ++task)
      total += p.partial_loss[task], square += p.partial_distance[task];
    distance[row] = static_cast<A>(std::sqrt(square) / std::abs(double{p.span[row]}));
  }
  *loss = static_cast<A>(total);
}

std::tuple<Tensor, Tensor, Tensor> mfd_loss(const Tensor& x, const Tensor& end_teacher,
                                            const Tensor& end_aux, const Tensor& span,
                                            const std::optional<Tensor>& weight) {
  check(x, end_teacher, end_aux, span, weight);
  const Outputs out = make_outputs(x, wide_type(x));
  if (x.numel() == 0) return zero_sums(out);

  const int64_t rows = x.size(0), n = x.numel() / rows;
  const int64_t blocks = (n + kLossBlock - 1) / kLossBlock;
  std::vector<double> partials(2 * rows * blocks);
  dispatch_cpu(op, x, [&](auto element) {
    using T = decltype(element);
    const MfdLossParams<T> params{
        .x = data_ptr<T>(x),
        .end_teacher = data_ptr<T>(end_teacher),
        .end_aux = data_ptr<T>(end_aux),
        .span = data_ptr<accumulate_t<T>>(span),
        .weight = optional_ptr<accumulate_t<T>>(weight),
        .grad = data_ptr<T>(out.grad),
        .partial_loss = partials.data(),
        .partial_distance = partials.data() + rows * blocks,
        .n = n,
        .blocks = blocks,
        .stride_teacher = end_teacher.stride(0),
        .stride_aux = end_aux.stride(0),
        .inverse_numel = 1.0 / static_cast<double>(x.numel()),
    };
    torch::stable::parallel_for(
        0, rows * blocks, kGrain / kLossBlock,
        [&](int64_t begin, int64_t end) { mfd_loss_cpu(params, begin, end); });
    using A = accumulate_t<T>;
    reduce(params, rows, data_ptr<A>(out.loss), data_ptr<A>(out.distance));
  });
  return {out.loss, out.distance, out.grad};
}

#ifdef MFD_WITH_CUDA
std::tuple<Tensor, Tensor, Tensor> mfd_loss_cuda(const Tensor& x, const Tensor& end_teacher,
                                                 const Tensor& end_aux, const Tensor& span,
                                                 const std::optional<Tensor>& weight) {
  check(x, end_teacher, end_aux, span, weight);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Outputs out = make_outputs(x, ScalarType::Float);
  if (x.numel() == 0) return zero_sums(out);

  const int64_t rows = x.size(0), n = x.numel() / rows;
  dispatch_cuda(op, x, [&](auto element) {
    using T = decltype(element);
    const int64_t blocks = cuda::mfd_loss_blocks<T>(n);
    const Tensor partials = torch::stable::new_empty(x, {2, rows, blocks}, ScalarType::Float);
    const cuda::MfdLossParams<T> params{
        .x = data_ptr<T>(x),
        .end_teacher = data_ptr<T>(end_teacher),
        .end_aux = data_ptr<T>(end_aux),
        .grad = data_ptr<T>(out.grad),
        .stride_teacher = end_teacher.stride(0),
        .stride_aux = end_aux.stride(0),
        .sums = {.dots = data_ptr<float>(partials),
                 .squares = data_ptr<float>(partials) + rows * blocks,
                 .span = data_ptr<float>(span),
                 .weight = optional_ptr<float>(weight),
                 .loss = data_ptr<float>(out.loss),
                 .distance = data_ptr<float>(out.distance),
                 .rows = rows,
                 .n = n,
                 .blocks = blocks},
    };
    cuda::launch_mfd_loss(params, current_stream(x));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out.loss, out.distance, out.grad};
}
#endif

}  // namespace
}  // namespace mfd

STABLE_TORCH_LIBRARY_IMPL(mfd_fast, CPU, m) { m.impl("mfd_loss", TORCH_BOX(&mfd::mfd_loss)); }
#ifdef MFD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mfd_fast, CUDA, m) {
  m.impl("_mfd_loss_cuda", TORCH_BOX(&mfd::mfd_loss_cuda));
}
#endif
