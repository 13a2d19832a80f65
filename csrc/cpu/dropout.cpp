// Cuts dropout's tensors into pieces for the threads. Sums over rows are taken part by part and then over the parts in
// order; how many parts there are follows from the shape alone.
#include "dropout.h"

#include <algorithm>
#include <vector>

#include "../math/rounding.h"
#include "dropout_kernels.h"
#include "huge_pages.h"
#include "instruction_set.h"
#include "parallel.h"

namespace fastft::cpu {
namespace {

constexpr int64_t kGrain = 16384;  // elements; below this a call is not worth a second thread
constexpr int64_t kMostParts = 64;

const DropoutKernels& kernels() {
#if defined(__x86_64__)
  if (best_set() == InstructionSet::v4) return dropout_v4;
  if (best_set() == InstructionSet::v3) return dropout_v3;
#endif
  return dropout_baseline;
}

int64_t width(DType dtype) {
  return dtype == DType::f64 ? sizeof(double) : sizeof(float);
}

// Row ranges of about equal size for sums that are taken part by part.
struct Parts {
  int64_t rows, count;

  Parts(int64_t rows, int64_t columns)
      : rows(rows),
        count(std::clamp<int64_t>(rows * columns / kGrain, 1, std::min(kMostParts, std::max<int64_t>(1, rows)))) {}
  int64_t begin(int64_t part) const { return rows * part / count; }
};

// out[c] = Σ_part partial[part][c], rounded to the dtype of out.
template <typename T>
void add_parts(const std::vector<unsigned char>& partial, int64_t parts, int64_t stride, int64_t first, int64_t columns,
               void* out, DType dtype) {
  const T* sums = reinterpret_cast<const T*>(partial.data()) + first;
  for (int64_t c = 0; c < columns; ++c) {
    T total = T(0);
    for (int64_t p = 0; p < parts; ++p) total += sums[p * stride + c];
    if constexpr (sizeof(T) == sizeof(double)) {
      static_cast<double*>(out)[c] = total;
    } else {
      if (dtype == DType::bf16) narrow(total, static_cast<bfloat16*>(out) + c);
      if (dtype == DType::f16) narrow(total, static_cast<float16*>(out) + c);
      if (dtype == DType::f32) static_cast<float*>(out)[c] = total;
    }
  }
}

void sum_parts(const std::vector<unsigned char>& partial, int64_t parts, int64_t stride, int64_t first, int64_t columns,
               void* out, DType computed, DType dtype) {
  if (out == nullptr) return;
  if (computed == DType::f64)
    add_parts<double>(partial, parts, stride, first, columns, out, dtype);
  else
    add_parts<float>(partial, parts, stride, first, columns, out, dtype);
}

}  // namespace

void bias_dropout_add(const BiasDropoutAdd& call) {
  want_huge_pages(call.y, call.numel * item_size(call.dtype));
  // In units of four elements, which share one call of the generator.
  parallel_for((call.numel + 3) / 4, kGrain / 4, [&](int64_t begin, int64_t end) {
    kernels().bias_dropout_add(call, 4 * begin, std::min(4 * end, call.numel));
  });
}

void bias_dropout_add_backward(const BiasDropoutAddBackward& call) {
  want_huge_pages(call.dx, call.rows * call.columns * item_size(call.x_dtype));
  const Parts parts(call.rows, call.columns);
  const int64_t bytes = call.columns * width(call.dtype);
  std::vector<unsigned char> partial(parts.count * bytes);
  parallel_for(parts.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      kernels().bias_dropout_add_backward(call, parts.begin(p), parts.begin(p + 1), partial.data() + p * bytes);
  });
  sum_parts(partial, parts.count, call.columns, 0, call.columns, call.dbias, call.dtype, call.bias_dtype);
}

void dropout_add_norm(const DropoutAddNorm& call) {
  want_huge_pages(call.y, call.rows * call.columns * item_size(call.dtype));
  want_huge_pages(call.sum, call.rows * call.columns * item_size(call.dtype));
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, call.columns));
  parallel_for(call.rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<unsigned char> scratch(3 * call.columns * width(call.dtype));
    kernels().dropout_add_norm(call, begin, end, scratch.data());
  });
}

void dropout_add_norm_backward(const DropoutAddNormBackward& call) {
  want_huge_pages(call.dx, call.rows * call.columns * item_size(call.x_dtype));
  want_huge_pages(call.dresidual, call.rows * call.columns * item_size(call.residual_dtype));
  const Parts parts(call.rows, call.columns);
  const int64_t bytes = 2 * call.columns * width(call.dtype);
  std::vector<unsigned char> partial(parts.count * bytes);
  parallel_for(parts.count, 1, [&](int64_t begin, int64_t end) {
    std::vector<unsigned char> scratch(3 * call.columns * width(call.dtype));
    for (int64_t p = begin; p < end; ++p)
      kernels().dropout_add_norm_backward(call, parts.begin(p), parts.begin(p + 1), partial.data() + p * bytes,
                                          scratch.data());
  });
  const int64_t n = call.columns;
  sum_parts(partial, parts.count, 2 * n, 0, n, call.dweight, call.dtype, call.weight_dtype);
  sum_parts(partial, parts.count, 2 * n, n, n, call.dbias, call.dtype, call.weight_dtype);
}

}  // namespace fastft::cpu
