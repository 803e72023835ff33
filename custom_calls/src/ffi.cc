// The XLA FFI handlers of products: they check what they are given, describe it to the copy engine and launch a compiled
// kernel.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <utility>

#include "check.h"
#include "handler.h"
#include "instance.h"
#include "tensor_maps.h"

namespace latent_moe {
namespace {

struct Compiled {
  cudaError_t (*launch)(Args const&, int, cudaStream_t);
  int (*max_experts)();
};

template <size_t... I>
constexpr std::array<Compiled, sizeof...(I)> compiled(std::index_sequence<I...>) {
  return {Compiled{&launch<I>, &max_experts<I>}...};
}
constexpr auto kCompiled = compiled(std::make_index_sequence<kNumInstances>{});

std::string to_string(Tile const& t) {
  return std::to_string(t.rows) + "x" + std::to_string(t.columns) + " stages " + std::to_string(t.stages) + " cluster " +
         std::to_string(t.cluster_rows) + "x" + std::to_string(t.cluster_columns);
}

bool same(Tile const& a, Tile const& b) {
  return a.rows == b.rows && a.columns == b.columns && a.stages == b.stages && a.cluster_rows == b.cluster_rows &&
         a.cluster_columns == b.cluster_columns;
}

// What a call asks for: the attributes that all handlers share.
struct Request {
  Contraction contraction;
  Epilogue epilogue = Epilogue::kStore;
  Activation activation = Activation::kNone;
  Tile tile;
};

ffi::Error run(Request const& request, Type type, Args const& given, cudaStream_t stream) {
  std::string tiles;
  for (int i = 0; i < kNumInstances; ++i) {
    Instance const& instance = kInstances[i];
    if (instance.type != type || instance.contraction != request.contraction || instance.epilogue != request.epilogue ||
        instance.activation != request.activation) {
      continue;
    }
    if (!same(instance.tile, request.tile)) {
      tiles += (tiles.empty() ? "" : "; ") + to_string(instance.tile);
      continue;
    }
    if (int const most = kCompiled[i].max_experts(); given.num_experts > most) {
      return refuse(std::to_string(given.num_experts) + " experts are more than the " + std::to_string(most) +
                    " of tile " + to_string(request.tile));
    }
    int device = 0, num_sms = 0;
    auto error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
    Args args = given;
    args.sides = sides_of(device);
    if (error == cudaSuccess) error = kCompiled[i].launch(args, num_sms, stream);
    if (error == cudaSuccess) return ffi::Error::Success();
    return ffi::Error::Internal(std::string("jax_latent_moe: ") + cudaGetErrorString(error) + ", tile " +
                                to_string(request.tile) + ", " + std::to_string(args.num_experts) + " experts");
  }
  return refuse("no kernel was compiled for tile " + to_string(request.tile) + "; there are: " +
                (tiles.empty() ? "none" : tiles));
}

// The kernel's own numbers: two that count tiles; where rows are gathered, two that count chunks of these, and how many
// are there, of all and of each 64.
void take_counter(Check& check, Args& args, ffi::AnyBuffer const& counter) {
  int64_t const size = args.gather.table == nullptr ? 2 : 5 + (int64_t{args.num_rows} + 63) / 64;
  check.buffer("the counter", counter, ffi::DataType::S32, {size});
  args.counter = static_cast<uint64_t*>(counter.untyped_data());
  args.counter_bytes = size * sizeof(int32_t);
  args.gather.taken = reinterpret_cast<unsigned long long*>(args.counter + 1);
  args.gather.ready = reinterpret_cast<int32_t*>(args.counter + 2);
}

// What a call says of rows that may have to be gathered: which, times what (or times nothing, where there are no
// weights), and room for them.
struct Gathering {
  ffi::AnyBuffer const& ids;
  ffi::AnyBuffer const& weights;
  ffi::AnyBuffer const& room;
};

// Rows [rows][width] in `data`, from a column on, or those that are to be gathered from this table.
struct Rows {
  ffi::AnyBuffer const& data;
  Gathering const* gathering = nullptr;
  int64_t first_column = 0;

  int64_t count() const { return (gathering ? gathering->ids : data).dimensions()[0]; }
  int64_t pitch() const { return data.dimensions()[1]; }
  int64_t width() const { return pitch() - first_column; }
  void const* start() const {
    return static_cast<char const*>((gathering ? gathering->room : data).untyped_data()) + 2 * first_column;
  }

  // Of data, and of ids, which may be of any shape.
  bool have_axes(Check& check, char const* name) const {
    check.that(type_of(data).has_value(), std::string(name) + " must be bfloat16 or float16");
    check.that(data.dimensions().size() == 2, std::string(name) + " of shape " + shape(data) + " must have 2 axes");
    check.that(first_column >= 0 && first_column % 8 == 0 && (!gathering || first_column == 0),
               "first_column=" + std::to_string(first_column) + " must be a multiple of 8, and 0 of rows to be gathered");
    if (gathering) {
      ffi::AnyBuffer const& ids = gathering->ids;
      check.that(ids.dimensions().size() == 1, "row_ids of shape " + shape(ids) + " must have 1 axis");
    }
    return check.error().empty();
  }

  void describe(Check& check, Args& args, Tile const& tile) const {
    if (!gathering) return;
    auto const& [ids, weights, room] = *gathering;
    int64_t const table_rows = data.dimensions()[0], width = data.dimensions()[1];
    bool const weighted = weights.element_count() > 0;
    check.buffer("row_ids", ids, ffi::DataType::S32, {count()});
    check.buffer("weights of gathered rows", weights, ffi::DataType::F32, {weighted ? count() : 0});
    check.buffer("room for rows", room, data.element_type(), {count(), width});
    check.that(table_rows > 0, "rows of shape " + shape(data) + " hold none to gather");
    check.that(table_rows < int64_t{1} << 31, "there are " + std::to_string(table_rows) + " rows to gather from, 2^31 or more");
    check.that(tile.rows > 64, "tiles of " + std::to_string(tile.rows) + " rows gather none");
    args.gather.units = width / 8;
    args.gather.table = static_cast<uint4 const*>(data.untyped_data());
    args.gather.table_rows = table_rows;
    args.gather.row_ids = static_cast<int32_t const*>(ids.untyped_data());
    args.gather.weights = weighted ? static_cast<float const*>(weights.untyped_data()) : nullptr;
    args.gather.rows = static_cast<uint4*>(room.untyped_data());
  }
};

// rows x w or rows x w^T: what the plain and the fused products have in common.
struct Product {
  Check check;
  Args args = {};
  Type type = Type::kBf16;
  int64_t rows = 0, in = 0, out = 0;

  Product(Request const& request, Rows const& given, ffi::AnyBuffer const& w, ffi::AnyBuffer const& sizes,
          bool rows_first) {
    ffi::AnyBuffer const& x = given.data;
    check.that(w.dimensions().size() == 3, "w of shape " + shape(w) + " must have 3 axes");
    if (!given.have_axes(check, "rows")) return;
    bool const transpose = request.contraction == Contraction::kRowsWt;
    int64_t const experts = w.dimensions()[0], k = w.dimensions()[1], n = w.dimensions()[2];
    type = *type_of(x);
    rows = given.count();
    in = transpose ? n : k;
    out = transpose ? k : n;
    check.buffer("rows", x, x.element_type(), {x.dimensions()[0], given.first_column + in});
    check.buffer("w", w, x.element_type(), {experts, k, n});
    check.buffer("group_sizes", sizes, ffi::DataType::S32, {experts});
    check.features("the second axis of w", k);
    check.features("the third axis of w", n);
    check.that(rows < (int64_t{1} << 31) - 256, "there are " + std::to_string(rows) + " rows, 2^31 or more");
    check.that(experts > 0, "there are no experts");
    if (!check.error().empty() || rows == 0) return;
    given.describe(check, args, request.tile);
    check(window_map(&args.a, type, given.start(), in, given.pitch(), 64));
    bool const gated = request.epilogue == Epilogue::kActivation && is_gated(request.activation);
    args.whole_b = !transpose && n % (gated ? 128 : 64) == 0;
    if (args.whole_b) {
      check(blocks_map(&args.b, type, w.untyped_data(), experts, k, n, request.tile.columns / (gated ? 128 : 64)));
    } else {
      check(dense_map(&args.b, type, w.untyped_data(), experts, k, n, transpose ? request.tile.columns : 64));
    }
    args.group_sizes = sizes.typed_data<int32_t>();
    args.num_experts = experts;
    args.num_rows = rows;
    args.contracted = in;
    args.rows_first = rows_first;
  }

  ffi::DataType element_type() const { return type == Type::kF16 ? ffi::DataType::F16 : ffi::DataType::BF16; }

  ffi::Error finish(Request const& request, ffi::AnyBuffer const& counter, cudaStream_t stream) {
    take_counter(check, args, counter);
    if (!check.error().empty()) return refuse(check.error());
    return rows == 0 ? ffi::Error::Success() : run(request, type, args, stream);
  }
};

Tile tile_of(int32_t rows, int32_t columns, int32_t stages, int32_t cluster_rows, int32_t cluster_columns) {
  return {rows, columns, stages, cluster_rows, cluster_columns};
}

ffi::Error matmul(cudaStream_t stream, ffi::AnyBuffer rows, ffi::AnyBuffer w, ffi::AnyBuffer sizes,
                  ffi::AnyBuffer row_ids, ffi::AnyBuffer gather_weights, ffi::Result<ffi::AnyBuffer> out,
                  ffi::Result<ffi::AnyBuffer> room, ffi::Result<ffi::AnyBuffer> counter, bool gathered, bool transpose_w,
                  int32_t first_column, int32_t tile_rows, int32_t tile_columns, int32_t stages, int32_t cluster,
                  bool rows_first) {
  Request request{transpose_w ? Contraction::kRowsWt : Contraction::kRowsW};
  request.tile = tile_of(tile_rows, tile_columns, stages, 1, cluster);
  Gathering const gathering{row_ids, gather_weights, *room};
  Product product(request, {rows, gathered ? &gathering : nullptr, first_column}, w, sizes, rows_first);
  if (product.check.error().empty()) {
    product.check.buffer("the result", *out, rows.element_type(), {product.rows, product.out});
    product.args.out_columns = product.out;
    product.args.out = out->untyped_data();
  }
  return product.finish(request, *counter, stream);
}

// What both fused products have in common: `out` is the pre-activation, gate and hidden rows, or the gradient, if it is
// stored at all.
void fuse(Product& product, Request const& request, ffi::AnyBuffer const& out, bool stored, int64_t width,
          int32_t activation, float beta, float linear_beta) {
  Check& check = product.check;
  if (!check.error().empty()) return;
  check.that(activation > 0 && activation <= static_cast<int32_t>(Activation::kSituGlu),
             "activation=" + std::to_string(activation) + " is not known");
  check.that(request.activation != Activation::kSituGlu || (beta > 0 && linear_beta >= 0),
             "beta=" + std::to_string(beta) + " must be positive, linear_beta=" + std::to_string(linear_beta) +
                 " at least 0");
  check.features("the width of hidden rows", width);
  check.buffer("the pre-activation", out, product.element_type(),
               {stored ? product.rows : 0, is_gated(request.activation) ? 2 * width : width});
  Args& args = product.args;
  args.out = out.untyped_data();
  args.out_columns = width;
  args.beta = beta;
  args.linear_beta = linear_beta;
}

ffi::Error matmul_activation(cudaStream_t stream, ffi::AnyBuffer rows, ffi::AnyBuffer w, ffi::AnyBuffer sizes,
                             ffi::AnyBuffer row_ids, ffi::AnyBuffer gather_weights, ffi::Result<ffi::AnyBuffer> pre,
                             ffi::Result<ffi::AnyBuffer> hidden, ffi::Result<ffi::AnyBuffer> room,
                             ffi::Result<ffi::AnyBuffer> counter, bool gathered, int32_t activation, float beta,
                             float linear_beta, bool keep_pre, int32_t tile_rows, int32_t tile_columns, int32_t stages,
                             int32_t cluster, bool rows_first) {
  Request request{Contraction::kRowsW, Epilogue::kActivation, static_cast<Activation>(activation)};
  request.tile = tile_of(tile_rows, tile_columns, stages, 1, cluster);
  Gathering const gathering{row_ids, gather_weights, *room};
  Product product(request, {rows, gathered ? &gathering : nullptr}, w, sizes, rows_first);
  int64_t const width = is_gated(request.activation) ? product.out / 2 : product.out;
  fuse(product, request, *pre, keep_pre, width, activation, beta, linear_beta);
  if (product.check.error().empty()) {
    bool const in_one = keep_pre && keeps_gate(request.activation);
    product.check.buffer("hidden rows", *hidden, product.element_type(), {in_one ? 0 : product.rows, width});
    product.args.hidden = hidden->untyped_data();
    product.args.keep_pre = keep_pre;
  }
  return product.finish(request, *counter, stream);
}

ffi::Error matmul_activation_grad(cudaStream_t stream, ffi::AnyBuffer dout, ffi::AnyBuffer w, ffi::AnyBuffer sizes,
                                  ffi::AnyBuffer kept, ffi::AnyBuffer row_weights, ffi::AnyBuffer row_ids,
                                  ffi::AnyBuffer gather_weights, ffi::Result<ffi::AnyBuffer> dpre,
                                  ffi::Result<ffi::AnyBuffer> hidden, ffi::Result<ffi::AnyBuffer> partial,
                                  ffi::Result<ffi::AnyBuffer> room, ffi::Result<ffi::AnyBuffer> counter, bool gathered,
                                  int32_t activation, float beta, float linear_beta, int32_t tile_rows,
                                  int32_t tile_columns, int32_t stages, int32_t cluster, bool rows_first) {
  Request request{Contraction::kRowsWt, Epilogue::kActivationGrad, static_cast<Activation>(activation)};
  request.tile = tile_of(tile_rows, tile_columns, stages, 1, cluster);
  Gathering const gathering{row_ids, gather_weights, *room};
  Product product(request, {dout, gathered ? &gathering : nullptr}, w, sizes, rows_first);
  fuse(product, request, *dpre, true, product.out, activation, beta, linear_beta);
  if (product.check.error().empty()) {
    int64_t const column_tiles = (product.out + tile_columns - 1) / tile_columns;
    product.check.buffer("what was kept", kept, product.element_type(), {product.rows, dpre->dimensions()[1]});
    product.check.buffer("hidden rows", *hidden, product.element_type(),
                         {keeps_hidden(request.activation) ? 0 : product.rows, product.out});
    product.check.buffer("row_weights", row_weights, ffi::DataType::F32, {product.rows});
    product.check.buffer("the sums", *partial, ffi::DataType::F32, {column_tiles, product.rows});
    product.args.kept = kept.untyped_data();
    product.args.hidden = hidden->untyped_data();
    product.args.row_weights = static_cast<float const*>(row_weights.untyped_data());
    product.args.partial = static_cast<float*>(partial->untyped_data());
  }
  return product.finish(request, *counter, stream);
}

ffi::Error outer(cudaStream_t stream, ffi::AnyBuffer rows, ffi::AnyBuffer dout, ffi::AnyBuffer sizes,
                 ffi::AnyBuffer row_ids, ffi::AnyBuffer gather_weights, ffi::Result<ffi::AnyBuffer> out,
                 ffi::Result<ffi::AnyBuffer> room, ffi::Result<ffi::AnyBuffer> counter, bool gathered_rows,
                 bool gathered_dout, int32_t first_column, int32_t tile_rows, int32_t tile_columns, int32_t stages,
                 int32_t cluster_rows, int32_t cluster_columns) {
  Request request{Contraction::kOuter};
  request.tile = tile_of(tile_rows, tile_columns, stages, cluster_rows, cluster_columns);
  Gathering const gathering{row_ids, gather_weights, *room};
  Rows const left{rows, gathered_rows ? &gathering : nullptr, first_column};
  Rows const right{dout, gathered_dout ? &gathering : nullptr};
  Check check;
  check.that(!gathered_rows || !gathered_dout, "one kernel gathers the rows of one operand, not of both");
  check.that(sizes.dimensions().size() == 1, "group_sizes of shape " + shape(sizes) + " must have 1 axis");
  if (!left.have_axes(check, "rows") || !right.have_axes(check, "dout")) return refuse(check.error());
  int64_t const experts = sizes.dimensions()[0], num_rows = left.count();
  int64_t const k = left.width(), n = right.width();
  check.that(right.count() == num_rows, "rows and dout are " + std::to_string(num_rows) + " and " +
                                            std::to_string(right.count()) + " rows, not as many");
  check.buffer("rows", rows, rows.element_type(), {rows.dimensions()[0], first_column + k});
  check.buffer("dout", dout, rows.element_type(), {dout.dimensions()[0], n});
  check.buffer("group_sizes", sizes, ffi::DataType::S32, {experts});
  check.buffer("the result", *out, rows.element_type(), {experts, k, n});
  check.features("the width of rows", k);
  check.features("the width of dout", n);
  check.that(experts > 0, "there are no experts");
  check.that(num_rows < (int64_t{1} << 31) - 256, "there are " + std::to_string(num_rows) + " rows, 2^31 or more");
  if (!check.error().empty()) return refuse(check.error());
  if (num_rows == 0) {
    auto const error = cudaMemsetAsync(out->untyped_data(), 0, out->size_bytes(), stream);
    return error == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(error));
  }
  Type const type = *type_of(rows);
  int const depth = step_depth({type, request.contraction, request.epilogue, request.activation, request.tile});
  Args args = {};
  left.describe(check, args, request.tile);
  right.describe(check, args, request.tile);
  auto const map = [&](CUtensorMap* to, Rows const& given, bool whole, int tile) {
    check(whole ? blocks_window_map(to, type, given.start(), given.width(), given.pitch(), depth, tile / 64)
                : window_map(to, type, given.start(), given.width(), given.pitch(), depth));
  };
  args.whole_a = cluster_columns == 1 && k % 64 == 0;
  args.whole_b = cluster_rows == 1 && n % 64 == 0;
  map(&args.a, left, args.whole_a, tile_rows);
  map(&args.b, right, args.whole_b, tile_columns);
  check(dense_map(&args.boxes, type, out->untyped_data(), experts, k, n, 16));
  args.group_sizes = sizes.typed_data<int32_t>();
  args.num_experts = experts;
  args.num_rows = num_rows;
  take_counter(check, args, *counter);
  args.out_rows = k;
  args.out_columns = n;
  if (!check.error().empty()) return refuse(check.error());
  return run(request, type, args, stream);
}

// XLA calls this before it records or runs a program, when one may still wait for the device.
ffi::Error prepare(cudaStream_t stream, int32_t device, ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  auto const error = measure_sides(device, stream);
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_latent_moe: ") + cudaGetErrorString(error) + " while timing the L2 cache");
}

auto bind_prepare() {
  return ffi::Ffi::BindInitialize()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Ctx<ffi::DeviceOrdinal>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs();
}

auto bind_rows() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Arg<ffi::AnyBuffer>()   // rows
      .Arg<ffi::AnyBuffer>()   // w, or dout
      .Arg<ffi::AnyBuffer>();  // group_sizes
}

template <class Binding>
auto with_activation(Binding&& binding) {
  return std::move(binding)
      .template Attr<int32_t>("activation")
      .template Attr<float>("beta")
      .template Attr<float>("linear_beta");
}

template <class Binding>
auto with_tile(Binding&& binding) {
  return std::move(binding)
      .template Attr<int32_t>("tile_rows")
      .template Attr<int32_t>("tile_columns")
      .template Attr<int32_t>("stages");
}

template <class Binding>
auto with_matmul_tile(Binding&& binding) {
  return with_tile(std::move(binding))
      .template Attr<int32_t>("cluster")
      .template Attr<bool>("rows_first");
}

// The last operands of any product, and its last results: room for gathered rows, and the counter.
template <class Binding>
auto with_gather(Binding&& binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()   // row_ids
      .template Arg<ffi::AnyBuffer>();  // weights of gathered rows
}

template <class Binding>
auto with_room(Binding&& binding) {
  return std::move(binding).template Ret<ffi::AnyBuffer>().template Ret<ffi::AnyBuffer>();
}

auto bind_matmul() {
  auto binding = with_room(with_gather(bind_rows()).Ret<ffi::AnyBuffer>());
  return with_matmul_tile(std::move(binding).Attr<bool>("gathered").Attr<bool>("transpose_w").Attr<int32_t>("first_column"));
}

auto bind_activation() {
  auto binding = with_room(with_gather(bind_rows()).Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
  return with_matmul_tile(with_activation(std::move(binding).Attr<bool>("gathered")).Attr<bool>("keep_pre"));
}

auto bind_activation_grad() {
  auto operands = bind_rows()
                      .Arg<ffi::AnyBuffer>()   // kept
                      .Arg<ffi::AnyBuffer>();  // row_weights
  auto binding = with_room(
      with_gather(std::move(operands)).Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
  return with_matmul_tile(with_activation(std::move(binding).Attr<bool>("gathered")));
}

auto bind_outer() {
  auto binding = with_room(with_gather(bind_rows()).Ret<ffi::AnyBuffer>());
  return with_tile(std::move(binding).Attr<bool>("gathered_rows").Attr<bool>("gathered_dout").Attr<int32_t>("first_column"))
      .Attr<int32_t>("cluster_rows")
      .Attr<int32_t>("cluster_columns");
}

}  // namespace
}  // namespace latent_moe

LATENT_MOE_HANDLER(latent_moe_matmul, latent_moe::matmul, latent_moe::bind_matmul());
LATENT_MOE_HANDLER(latent_moe_matmul_activation, latent_moe::matmul_activation, latent_moe::bind_activation());
LATENT_MOE_HANDLER(latent_moe_matmul_activation_grad, latent_moe::matmul_activation_grad,
                   latent_moe::bind_activation_grad());
LATENT_MOE_HANDLER(latent_moe_outer, latent_moe::outer, latent_moe::bind_outer());
LATENT_MOE_HANDLER(latent_moe_prepare, latent_moe::prepare, latent_moe::bind_prepare());

// Checked when the library is loaded: the Python side and this must agree on targets, attributes and tiles.
LATENT_MOE_EXPORT int32_t latent_moe_interface_version() { return 7; }

// For tests: Sides::kMost bits, by multiprocessor.
LATENT_MOE_EXPORT void latent_moe_sides(int32_t device, uint32_t* bits) {
  latent_moe::Sides const sides = latent_moe::sides_of(device);
  std::copy(std::begin(sides.bits), std::end(sides.bits), bits);
}

LATENT_MOE_EXPORT int32_t latent_moe_num_instances() { return latent_moe::kNumInstances; }

// type, contraction, epilogue, activation, rows, columns, stages, cluster_rows, cluster_columns, most experts.
LATENT_MOE_EXPORT void latent_moe_instance(int32_t index, int32_t* fields) {
  latent_moe::Instance const& instance = latent_moe::kInstances[index];
  latent_moe::Tile const& tile = instance.tile;
  int32_t const values[] = {static_cast<int32_t>(instance.type),
                            static_cast<int32_t>(instance.contraction),
                            static_cast<int32_t>(instance.epilogue),
                            static_cast<int32_t>(instance.activation),
                            tile.rows,
                            tile.columns,
                            tile.stages,
                            tile.cluster_rows,
                            tile.cluster_columns,
                            latent_moe::kCompiled[index].max_experts()};
  for (int i = 0; i < 10; ++i) fields[i] = values[i];
}
