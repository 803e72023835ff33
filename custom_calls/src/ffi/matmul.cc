// The handlers of fwd and dgrad, without and with an activation, in 16 bits or of codes, to rows or to codes. They check their
// arguments, make the tensor maps for TMA and launch a compiled kernel.
#include <cstdint>
#include <string>

#include "common/tensor_maps.h"
#include "ffi/kernels.h"
#include "ffi/launch.h"
#include "ffi/rows.h"
#include "interface.h"

namespace latent_moe {
namespace {

// rows x w (fwd) or rows x w^T (dgrad): the part that all handlers share. A weight of codes is stored transposed. If a check
// fails, only `check` is set.
class Product {
 public:
  Check check;
  Args args = {};
  int64_t num_rows = 0, in = 0, out = 0;

  Product(Kernel const& kernel, Rows const& rows, ffi::AnyBuffer const& w, ffi::AnyBuffer const& group_sizes,
          bool rows_first)
      : kernel_(kernel) {
    check.that(w.dimensions().size() == 3, "w of shape " + shape(w) + " must have 3 axes");
    if (!rows.have_axes(check)) return;
    Format const format = kernel.format;
    bool const transposes = kernel.contraction == Contraction::kDgrad || format == Format::kE4m3;
    int64_t const experts = w.dimensions()[0], k = w.dimensions()[1], n = w.dimensions()[2];
    num_rows = rows.count();
    in = transposes ? n : k;
    out = transposes ? k : n;
    check.buffer(rows.name, rows.data, data_type(format), {rows.data.dimensions()[0], rows.first_column + in});
    check.buffer("w", w, data_type(format), {experts, k, n});
    check.buffer("group_sizes", group_sizes, ffi::DataType::S32, {experts});
    check.features("the second axis of w", k, format);
    check.features("the third axis of w", n, format);
    check.that(num_rows < kMostRows, std::to_string(num_rows) + " rows must be fewer than " + std::to_string(kMostRows));
    check.that(experts > 0, "there are no experts");
    if (!check.ok() || num_rows == 0) return;
    rows.describe(check, args.gather, kernel);
    check(window_map(&args.a, format, rows.start(), in, rows.pitch(), kernel.loaded_rows));
    int const block = block_columns(format);
    int const halves = kernel.contraction == Contraction::kFwd && is_gated(kernel.activation) ? 2 : 1;
    args.whole_b = !transposes && n % (halves * block) == 0;
    if (args.whole_b) {
      int const box_blocks = kernel.tile.columns / (halves * block);
      check(blocks_map(&args.b, format, w.untyped_data(), experts, k, n, kernel.step_depth, box_blocks));
    } else {
      int const box_rows = transposes ? kernel.tile.columns / halves : kernel.step_depth;
      check(dense_map(&args.b, format, w.untyped_data(), experts, k, n, box_rows));
    }
    args.problem.group_sizes = group_sizes.typed_data<int32_t>();
    args.problem.num_experts = experts;
    args.problem.num_rows = num_rows;
    args.problem.contracted = in;
    args.problem.rows_first = rows_first;
  }

  // Sets the output, of `width` columns (of one half if the activation is gated).
  void write_to(ffi::AnyBuffer const& buffer, int64_t width) {
    args.out = buffer.untyped_data();
    args.problem.out_columns = width;
  }

  // Sets the activation's parameters.
  void activate(float beta, float linear_beta) {
    check.that(kernel_.activation != Activation::kSituGlu || (beta > 0 && linear_beta >= 0),
               "beta=" + std::to_string(beta) + " must be positive, and linear_beta=" + std::to_string(linear_beta) +
                   " at least 0");
    args.beta = beta;
    args.linear_beta = linear_beta;
  }

  ffi::Error launch(ffi::AnyBuffer const& counters, cudaStream_t stream) {
    if (check.ok()) take_counters(check, args, counters);
    if (!check.ok()) return refuse(check.error());
    return num_rows == 0 ? ffi::Error::Success() : latent_moe::launch(kernel_, args, stream);
  }

 private:
  Kernel const& kernel_;
};

}  // namespace

ffi::Error matmul(MatmulCall const& call) {
  Check named;
  Kernel const* kernel = named_kernel(named, call.kernel, {Contraction::kFwd, Contraction::kDgrad}, false);
  if (kernel == nullptr) return refuse(named.error());
  Gathering const gathering{call.row_ids, call.gather_weights, *call.gathered_rows};
  Rows const rows{"rows", call.rows, kernel->format, call.gathered ? &gathering : nullptr, call.first_column};
  Product product(*kernel, rows, call.w, call.group_sizes, call.rows_first);
  if (product.check.ok()) {
    product.check.buffer("out", *call.out, data_type(kernel->format), {product.num_rows, product.out});
    product.write_to(*call.out, product.out);
  }
  return product.launch(*call.counters, call.stream);
}

ffi::Error matmul_activation(MatmulActivationCall const& call) {
  Check named;
  Kernel const* kernel = named_kernel(named, call.kernel, {Contraction::kFwd}, true);
  if (kernel == nullptr) return refuse(named.error());
  Gathering const gathering{call.row_ids, call.gather_weights, *call.gathered_rows};
  Rows const rows{"rows", call.rows, kernel->format, call.gathered ? &gathering : nullptr};
  Product product(*kernel, rows, call.w, call.group_sizes, call.rows_first);
  Check& check = product.check;
  if (check.ok()) {
    int64_t const width = is_gated(kernel->activation) ? product.out / 2 : product.out;
    bool const in_one = call.keep_residual && kernel->residual == Residual::kGateHidden;
    ffi::DataType const type = data_type(kernel->format);
    check.that(!call.keep_residual || kernel->residual != Residual::kHidden,
               "keep_residual must be false: the residual of " + std::string(call.kernel) + " is its hidden rows");
    check.features("the width of hidden rows", width, kernel->format);
    check.buffer("residual", *call.residual, type, {call.keep_residual ? product.num_rows : 0, product.out});
    check.buffer("hidden", *call.hidden, type, {in_one ? 0 : product.num_rows, width});
    product.write_to(*call.residual, width);
    product.activate(call.beta, call.linear_beta);
    product.args.hidden = call.hidden->untyped_data();
    product.args.keep_residual = call.keep_residual;
  }
  return product.launch(*call.counters, call.stream);
}

ffi::Error matmul_activation_grad(MatmulActivationGradCall const& call) {
  Check named;
  Kernel const* kernel = named_kernel(named, call.kernel, {Contraction::kDgrad}, true);
  if (kernel == nullptr) return refuse(named.error());
  Gathering const gathering{call.row_ids, call.gather_weights, *call.gathered_rows};
  Rows const rows{"dout", call.dout, kernel->format, call.gathered ? &gathering : nullptr};
  Product product(*kernel, rows, call.w, call.group_sizes, call.rows_first);
  Check& check = product.check;
  if (check.ok()) {
    int64_t const num_rows = product.num_rows, width = product.out;
    int64_t const column_tiles = (width + kernel->tile.columns - 1) / kernel->tile.columns;
    int64_t const kept = is_gated(kernel->activation) ? 2 * width : width;
    ffi::DataType const type = data_type(kernel->format);
    check.buffer("dpre", *call.dpre, type, {num_rows, kept});
    check.buffer("residual", call.residual, type, {num_rows, kept});
    check.buffer("weighted_hidden", *call.weighted_hidden, type, {kernel->residual == Residual::kPre ? num_rows : 0, width});
    check.buffer("row_weights", call.row_weights, ffi::DataType::F32, {num_rows});
    check.buffer("row_weight_sums", *call.row_weight_sums, ffi::DataType::F32, {column_tiles, num_rows});
    product.write_to(*call.dpre, width);
    product.activate(call.beta, call.linear_beta);
    product.args.residual = call.residual.untyped_data();
    product.args.hidden = call.weighted_hidden->untyped_data();
    product.args.row_weights = static_cast<float const*>(call.row_weights.untyped_data());
    product.args.partial = static_cast<float*>(call.row_weight_sums->untyped_data());
  }
  return product.launch(*call.counters, call.stream);
}

namespace {

int64_t scale_blocks(int64_t size) { return (size + kScaleBlock - 1) / kScaleBlock; }

// The scales of both operands of a product of codes, of `halves` matrices side by side.
void set_scales(Product& product, ffi::AnyBuffer const& of_rows, ffi::AnyBuffer const& of_w, int64_t experts, int halves) {
  int64_t const steps = scale_blocks(product.in);
  product.check.buffer("row_scales", of_rows, ffi::DataType::F32, {steps, product.num_rows});
  product.check.buffer("w_scales", of_w, ffi::DataType::F32,
                       {experts, halves * scale_blocks(product.out / halves), steps});
  product.args.row_scales = static_cast<float const*>(of_rows.untyped_data());
  product.args.weight_scales = static_cast<float const*>(of_w.untyped_data());
}

// The kernel of that name, of codes and for the contraction. Null if a check fails.
Kernel const* kernel_of_codes(Check& check, std::string_view name, Contraction contraction) {
  Kernel const* kernel = find_kernel(name);
  if (kernel == nullptr) {
    check.that(false, not_compiled(name));
    return nullptr;
  }
  check.that(kernel->format == Format::kE4m3, "kernel=" + std::string(name) + " is not for codes");
  check.that(kernel->contraction == contraction, "kernel=" + std::string(name) + " is for another target");
  return check.ok() ? kernel : nullptr;
}

}  // namespace

ffi::Error matmul_codes(MatmulCodesCall const& call) {
  Check named;
  Kernel const* kernel = kernel_of_codes(named, call.kernel, Contraction::kFwd);
  if (named.ok()) named.that(!is_gated(kernel->activation), "kernel=" + std::string(call.kernel) + " stores only codes");
  if (!named.ok()) return refuse(named.error());
  Rows const rows{"rows", call.rows, kernel->format};
  Product product(*kernel, rows, call.w, call.group_sizes, call.rows_first);
  Check& check = product.check;
  if (check.ok()) {
    set_scales(product, call.row_scales, call.w_scales, call.w.dimensions()[0], 1);
    check.buffer("out", *call.out, data_type(product_format(kernel->format)), {product.num_rows, product.out});
    product.write_to(*call.out, product.out);
    product.args.hidden = call.out->untyped_data();  // of a kernel with an activation
  }
  return product.launch(*call.counters, call.stream);
}

ffi::Error matmul_encoded(MatmulEncodedCall const& call) {
  Check named;
  Kernel const* kernel = kernel_of_codes(named, call.kernel, Contraction::kFwd);
  if (named.ok()) named.that(kernel->encodes, "kernel=" + std::string(call.kernel) + " stores no codes");
  if (!named.ok()) return refuse(named.error());
  Rows const rows{"rows", call.rows, kernel->format};
  Product product(*kernel, rows, call.w, call.group_sizes, call.rows_first);
  Check& check = product.check;
  if (check.ok()) {
    int const halves = is_gated(kernel->activation) ? 2 : 1;
    int64_t const width = product.out / halves, num_rows = product.num_rows;
    ffi::DataType const type = data_type(product_format(kernel->format));
    set_scales(product, call.row_scales, call.w_scales, call.w.dimensions()[0], halves);
    check.features("the width of hidden rows", width, kernel->format);
    check.buffer("residual", *call.residual, type, {call.keep_residual ? num_rows : 0, product.out});
    check.buffer("codes", *call.codes, data_type(kernel->format), {num_rows, width});
    check.buffer("scales", *call.scales, ffi::DataType::F32, {scale_blocks(width), num_rows});
    product.write_to(*call.residual, width);
    product.activate(call.beta, call.linear_beta);
    product.args.hidden = call.residual->untyped_data();  // of a kernel whose residual is its hidden rows
    product.args.keep_residual = call.keep_residual;
    product.args.codes = static_cast<uint8_t*>(call.codes->untyped_data());
    product.args.code_scales = static_cast<float*>(call.scales->untyped_data());
    product.args.power_of_two = call.power_of_two;
  }
  return product.launch(*call.counters, call.stream);
}

ffi::Error matmul_encoded_grad(MatmulEncodedGradCall const& call) {
  Check named;
  Kernel const* kernel = kernel_of_codes(named, call.kernel, Contraction::kDgrad);
  if (!named.ok()) return refuse(named.error());
  Rows const rows{"dout", call.dout, kernel->format};
  Product product(*kernel, rows, call.w, call.group_sizes, call.rows_first);
  Check& check = product.check;
  if (check.ok()) {
    int64_t const num_rows = product.num_rows, width = product.out;
    ffi::DataType const type = data_type(product_format(kernel->format));
    set_scales(product, call.row_scales, call.w_scales, call.w.dimensions()[0], 1);
    check.buffer("residual", call.residual, type, {num_rows, width});
    check.buffer("row_weights", call.row_weights, ffi::DataType::F32, {num_rows});
    check.buffer("dpre", *call.dpre, type, {num_rows, width});
    check.buffer("codes", *call.codes, data_type(kernel->format), {num_rows, width});
    check.buffer("scales", *call.scales, ffi::DataType::F32, {scale_blocks(width), num_rows});
    check.buffer("row_weight_sums", *call.row_weight_sums, ffi::DataType::F32, {scale_blocks(width), num_rows});
    product.write_to(*call.dpre, width);
    product.args.residual = call.residual.untyped_data();
    product.args.row_weights = static_cast<float const*>(call.row_weights.untyped_data());
    product.args.codes = static_cast<uint8_t*>(call.codes->untyped_data());
    product.args.code_scales = static_cast<float*>(call.scales->untyped_data());
    product.args.partial = static_cast<float*>(call.row_weight_sums->untyped_data());
    product.args.power_of_two = call.power_of_two;
  }
  return product.launch(*call.counters, call.stream);
}

}  // namespace latent_moe
