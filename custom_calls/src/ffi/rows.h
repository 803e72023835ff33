// Rows as an operand of a product: dense, or gathered from a table.
#pragma once

#include <cstdint>
#include <string>

#include "common/args.h"
#include "common/check.h"

namespace latent_moe {

// The arguments of a call about rows that may be gathered from a table: their ids, their weights (empty if there are none)
// and the workspace to which they are gathered.
struct Gathering {
  ffi::AnyBuffer const& ids;
  ffi::AnyBuffer const& weights;
  ffi::AnyBuffer const& rows;
};

// Rows [rows][width]: `data` from a column on, or gathered from `data`.
struct Rows {
  char const* name;
  ffi::AnyBuffer const& data;
  Format format;
  Gathering const* gathering = nullptr;
  int64_t first_column = 0;

  int64_t count() const { return (gathering ? gathering->ids : data).dimensions()[0]; }
  int64_t pitch() const { return data.dimensions()[1]; }
  int64_t width() const { return pitch() - first_column; }
  void const* start() const {
    auto const* first = static_cast<char const*>((gathering ? gathering->rows : data).untyped_data());
    return first + element_bytes(format) * first_column;
  }

  // Checks the number of axes of data and ids. The functions above may be called only afterwards.
  bool have_axes(Check& check) const {
    check.that(data.dimensions().size() == 2, std::string(name) + " of shape " + shape(data) + " must have 2 axes");
    int const multiple = 16 / element_bytes(format);
    check.that(first_column >= 0 && first_column % multiple == 0 && (!gathering || first_column == 0),
               "first_column=" + std::to_string(first_column) + " must be a multiple of " + std::to_string(multiple) +
                   ", and 0 where rows are gathered");
    if (gathering) {
      ffi::AnyBuffer const& ids = gathering->ids;
      check.that(ids.dimensions().size() == 1, "row_ids of shape " + shape(ids) + " must have 1 axis");
    }
    return check.ok();
  }

  // Checks the arguments for gathering, if rows are gathered, and sets them in args.
  void describe(Check& check, Gather& gather, Kernel const& kernel) const {
    if (!gathering) return;
    auto const& [ids, weights, rows] = *gathering;
    int64_t const table_rows = data.dimensions()[0], width = data.dimensions()[1];
    bool const weighted = weights.element_count() > 0;
    check.buffer("row_ids", ids, ffi::DataType::S32, {count()});
    check.buffer("gather_weights", weights, ffi::DataType::F32, {weighted ? count() : 0});
    check.buffer("gathered_rows", rows, data.element_type(), {count(), width});
    check.that(table_rows > 0, std::string(name) + " of shape " + shape(data) + " has no row to gather");
    check.that(table_rows < int64_t{1} << 31,
               "the table has " + std::to_string(table_rows) + " rows, but must have fewer than 2^31");
    check.that(kernel.gathers, "kernel " + std::string(kernel.name) + " gathers no rows");
    gather.units = width * element_bytes(format) / 16;
    gather.table = static_cast<uint4 const*>(data.untyped_data());
    gather.table_rows = table_rows;
    gather.row_ids = static_cast<int32_t const*>(ids.untyped_data());
    gather.weights = weighted ? static_cast<float const*>(weights.untyped_data()) : nullptr;
    gather.rows = static_cast<uint4*>(rows.untyped_data());
  }
};

}  // namespace latent_moe
