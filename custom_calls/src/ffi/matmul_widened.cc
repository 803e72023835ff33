// The handler of bfloat16 rows times a weight in codes, which the kernel widens, with or without an activation.
#include <cstdint>
#include <string>

#include "common/tensor_maps.h"
#include "ffi/decode.h"
#include "ffi/kernels.h"
#include "ffi/launch.h"
#include "ffi/rows.h"
#include "interface.h"

namespace latent_moe {
namespace {

// Sets what the kernel reads. `num_rows` and `parts` of the weight are known when it is called.
void set_operands(Check& check, Args& args, Kernel const& kernel, MatmulWidenedCall const& call, Rows const& rows) {
  auto const sizes = call.w.dimensions();
  int64_t const experts = sizes[0], parts = sizes[1], n = sizes[2], k = rows.data.dimensions()[1];
  args.weight = weight(check, {"w", call.code, call.w, call.w_scales, call.w_more}, ffi::DataType::BF16, experts, parts, k, n);
  if (!check.ok()) return;
  check.that(args.weight.code != Code::kDense, "code=dense is for another target");
  check.that(args.weight.code != Code::kInt8 || args.weight.k_shift == kWholeAxis, "int8 codes must have one scale along k");
  check.that(args.weight.code != Code::kE4m3 || args.weight.k_shift == kWholeAxis || args.weight.n_shift != 0,
             "scales of blocks of E4M3 codes along k must be of 128 columns");
  check.that(args.weight.code != Code::kNvfp4 || args.weight.k % 32 == 0, "k must be a multiple of 32");
  check.buffer("rows", rows.data, ffi::DataType::BF16, {rows.data.dimensions()[0], k});
  check.buffer("group_sizes", call.group_sizes, ffi::DataType::S32, {experts});
  check.features("the third axis of w", n, kernel.format);
  check.that(parts == (is_gated(kernel.activation) ? 2 : 1),
             "w of shape " + shape(call.w) + " does not have the parts of " + std::string(kernel.name));
  check.that(rows.count() < kMostRows,
             std::to_string(rows.count()) + " rows must be fewer than " + std::to_string(kMostRows));
  check.that(experts > 0, "there are no experts");
  if (!check.ok() || rows.count() == 0) return;
  rows.describe(check, args.gather, kernel);
  check(window_map(&args.a, kernel.format, rows.start(), k, rows.pitch(), kernel.loaded_rows));
  // Codes are copied as bytes, whatever their format. A tile of a gated activation has a box of gates and one of the up half.
  int const box_features = kernel.tile.columns / parts;
  check(dense_map(&args.b, Format::kE4m3, args.weight.data, experts * parts, n, k / packing(args.weight.code), box_features));
  args.problem.group_sizes = call.group_sizes.typed_data<int32_t>();
  args.problem.num_experts = experts;
  args.problem.num_rows = rows.count();
  args.problem.contracted = k;
  args.problem.out_columns = n;
  args.problem.rows_first = call.rows_first;
}

// Sets what the kernel writes: `residual` and `hidden` rows, or `hidden` alone, as the product.
void set_results(Check& check, Args& args, Kernel const& kernel, MatmulWidenedCall const& call, int64_t num_rows) {
  int64_t const n = call.w.dimensions()[2], all = call.w.dimensions()[1] * n;
  bool const activates = kernel.activation != Activation::kNone;
  bool const in_one = call.keep_residual && kernel.residual == Residual::kGateHidden;
  check.that(!call.keep_residual || (activates && kernel.residual != Residual::kHidden),
             "keep_residual must be false: " + std::string(kernel.name) + " has no residual beside its result");
  check.that(kernel.activation != Activation::kSituGlu || (call.beta > 0 && call.linear_beta >= 0),
             "beta=" + std::to_string(call.beta) + " must be positive, and linear_beta=" + std::to_string(call.linear_beta) +
                 " at least 0");
  check.buffer("residual", *call.residual, ffi::DataType::BF16, {call.keep_residual ? num_rows : 0, all});
  check.buffer("hidden", *call.hidden, ffi::DataType::BF16, {in_one ? 0 : num_rows, n});
  args.out = (activates ? call.residual : call.hidden)->untyped_data();
  args.hidden = call.hidden->untyped_data();
  args.keep_residual = call.keep_residual;
  args.beta = call.beta;
  args.linear_beta = call.linear_beta;
}

}  // namespace

ffi::Error matmul_widened(MatmulWidenedCall const& call) {
  Check check;
  Kernel const* kernel = find_kernel(call.kernel);
  if (kernel == nullptr) return refuse(not_compiled(call.kernel));
  check.that(kernel->format == Format::kBf16Codes, "kernel=" + std::string(call.kernel) + " is for another target");
  check.that(call.w.dimensions().size() == 4, "w of shape " + shape(call.w) + " must have 4 axes");
  Gathering const gathering{call.row_ids, call.gather_weights, *call.gathered_rows};
  Rows const rows{"rows", call.rows, kernel->format, call.gathered ? &gathering : nullptr};
  if (!check.ok() || !rows.have_axes(check)) return refuse(check.error());
  Args args = {};
  set_operands(check, args, *kernel, call, rows);
  if (check.ok()) set_results(check, args, *kernel, call, rows.count());
  if (check.ok()) take_counters(check, args, *call.counters);
  if (!check.ok()) return refuse(check.error());
  return rows.count() == 0 ? ffi::Error::Success() : latent_moe::launch(*kernel, args, call.stream);
}

}  // namespace latent_moe
