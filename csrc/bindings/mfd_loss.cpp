#include "cpu/mfd_loss.h"

#include <cmath>
#include <vector>

#include "torch_utils.h"

namespace mfd {
namespace {

// Adds the partial sums of each row in order: the same result on any number of threads.
template <typename A>
void reduce(const std::vector<double>& loss, const std::vector<double>& square, int64_t blocks,
            A* loss_out, A* distance_out) {
  double total = 0.0;
  for (size_t first = 0, row = 0; first < loss.size(); first += blocks, ++row) {
    double row_square = 0.0;
    for (int64_t i = 0; i < blocks; ++i) total += loss[first + i], row_square += square[first + i];
    distance_out[row] = static_cast<A>(std::sqrt(row_square));
  }
  *loss_out = static_cast<A>(total);
}

std::tuple<Tensor, Tensor, Tensor> mfd_loss(const Tensor& x, const Tensor& end_teacher,
                                            const Tensor& end_aux, const Tensor& span,
                                            const std::optional<Tensor>& weight) {
  constexpr const char* op = "mfd_loss";
  check_contiguous(op, x, "x");
  check_same_shape(op, end_teacher, "end_teacher", x, "x");
  check_same_shape(op, end_aux, "end_aux", x, "x");
  check_dtype(op, end_teacher, "end_teacher", x.scalar_type());
  check_dtype(op, end_aux, "end_aux", x.scalar_type());
  check_dtype(op, span, "span", ScalarType::Float);

  const int64_t rows = x.size(0), n = rows ? x.numel() / rows : 0;
  const int64_t blocks = (n + kLossBlock - 1) / kLossBlock;
  const bool is_double = x.scalar_type() == ScalarType::Double;
  const ScalarType sum_type = is_double ? ScalarType::Double : ScalarType::Float;
  Tensor loss = torch::stable::new_zeros(x, {}, sum_type);
  Tensor distance = torch::stable::new_zeros(x, {rows}, sum_type);
  Tensor grad = torch::stable::empty_like(x);
  if (x.numel() == 0) return {loss, distance, grad};

  std::vector<double> partial_loss(rows * blocks), partial_distance(rows * blocks);
  dispatch_cpu(op, x, [&](auto element) {
    using T = decltype(element);
    const MfdLossParams<T> params{
        .x = data_ptr<T>(x),
        .end_teacher = data_ptr<T>(end_teacher),
        .end_aux = data_ptr<T>(end_aux),
        .span = data_ptr<float>(span),
        .weight = optional_ptr<float>(weight),
        .grad = data_ptr<T>(grad),
        .partial_loss = partial_loss.data(),
        .partial_distance = partial_distance.data(),
        .n = n,
        .blocks = blocks,
        .stride_teacher = end_teacher.stride(0),
        .stride_aux = end_aux.stride(0),
        .inverse_numel = 1.0 / static_cast<double>(x.numel()),
    };
    torch::stable::parallel_for(0, rows * blocks, kGrain / kLossBlock,
                                [&](int64_t begin, int64_t end) { mfd_loss_cpu(params, begin, end); });
  });
  if (is_double) {
    reduce(partial_loss, partial_distance, blocks, data_ptr<double>(loss), data_ptr<double>(distance));
  } else {
    reduce(partial_loss, partial_distance, blocks, data_ptr<float>(loss), data_ptr<float>(distance));
  }
  return {loss, distance, grad};
}

}  // namespace
}  // namespace mfd

STABLE_TORCH_LIBRARY_IMPL(mfd_fast, CPU, m) { m.impl("mfd_loss", TORCH_BOX(&mfd::mfd_loss)); }
