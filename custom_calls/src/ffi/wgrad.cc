// The handler of wgrad. It checks its arguments, makes the tensor maps for TMA and launches a compiled kernel.
#include <cstdint>
#include <string>

#include "common/tensor_maps.h"
#include "ffi/launch.h"
#include "ffi/rows.h"
#include "interface.h"

namespace latent_moe {

ffi::Error wgrad(WgradCall const& call) {
  Check check;
  Kernel const* kernel = named_kernel(check, call.kernel, {Contraction::kWgrad}, false);
  if (kernel == nullptr) return refuse(check.error());
  Format const format = kernel->format;
  Gathering const gathering{call.row_ids, call.gather_weights, *call.gathered_rows};
  Rows const lhs{"lhs", call.lhs, format, call.gathered_lhs ? &gathering : nullptr, call.first_column};
  Rows const rhs{"rhs", call.rhs, format, call.gathered_rhs ? &gathering : nullptr};
  check.that(!call.gathered_lhs || !call.gathered_rhs, "a kernel gathers the rows of one operand, not of both");
  check.that(call.group_sizes.dimensions().size() == 1,
             "group_sizes of shape " + shape(call.group_sizes) + " must have 1 axis");
  if (!lhs.have_axes(check) || !rhs.have_axes(check)) return refuse(check.error());
  int64_t const experts = call.group_sizes.dimensions()[0], num_rows = lhs.count();
  int64_t const k = lhs.width(), n = rhs.width();
  check.that(rhs.count() == num_rows, "lhs and rhs have " + std::to_string(num_rows) + " and " +
                                          std::to_string(rhs.count()) + " rows, not equally many");
  check.buffer("lhs", call.lhs, data_type(format), {call.lhs.dimensions()[0], lhs.pitch()});
  check.buffer("rhs", call.rhs, data_type(format), {call.rhs.dimensions()[0], n});
  check.buffer("group_sizes", call.group_sizes, ffi::DataType::S32, {experts});
  check.buffer("out", *call.out, data_type(format), {experts, k, n});
  check.features("the width of lhs", k, format);
  check.features("the width of rhs", n, format);
  check.that(experts > 0, "there are no experts");
  check.that(num_rows < kMostRows, std::to_string(num_rows) + " rows must be fewer than " + std::to_string(kMostRows));
  if (!check.ok()) return refuse(check.error());
  if (num_rows == 0) {
    auto const error = cudaMemsetAsync(call.out->untyped_data(), 0, call.out->size_bytes(), call.stream);
    return error == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(error));
  }
  Tile const& tile = kernel->tile;
  int const block = block_columns(format), depth = kernel->step_depth;
  Args args = {};
  lhs.describe(check, args.gather, *kernel);
  rhs.describe(check, args.gather, *kernel);
  auto const map = [&](CUtensorMap* to, Rows const& rows, bool whole, int columns) {
    check(whole ? blocks_window_map(to, format, rows.start(), rows.width(), rows.pitch(), depth, columns / block)
                : window_map(to, format, rows.start(), rows.width(), rows.pitch(), depth));
  };
  // An operand whose columns are cut into blocks is loaded in one box, unless blocks of the cluster share the load.
  args.whole_a = tile.cluster_columns == 1 && k % block == 0;
  args.whole_b = tile.cluster_rows == 1 && n % block == 0;
  map(&args.a, lhs, args.whole_a, tile.rows);
  map(&args.b, rhs, args.whole_b, tile.columns);
  check(dense_map(&args.boxes, format, call.out->untyped_data(), experts, k, n, kernel->stored_rows));
  args.problem.group_sizes = call.group_sizes.typed_data<int32_t>();
  args.problem.num_experts = experts;
  args.problem.num_rows = num_rows;
  args.problem.out_rows = k;
  args.problem.out_columns = n;
  take_counters(check, args, *call.counters);
  return check.ok() ? launch(*kernel, args, call.stream) : refuse(check.error());
}

}  // namespace latent_moe
