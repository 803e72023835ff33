// What a kernel that is launched early may not read: the results of the kernel before, until it has waited for its end.
#pragma once

#include "cuda.h"

namespace emulation {

// Runs a block that finds odd bytes in the results, NaN as floats, until one of its threads waits for the kernel before.
class Unfinished {
 public:
  struct Memory {
    void* data;
    size_t size;
  };

  explicit Unfinished(std::vector<Memory> results) : results_(std::move(results)) {}

  void run_block(int count, std::function<void()> const& kernel) const {
    std::vector<std::vector<char>> saved;
    for (Memory const& result : results_) {
      auto* data = static_cast<char*>(result.data);
      saved.emplace_back(data, data + result.size);
      std::memset(data, 0xff, result.size);
    }
    const auto finish = [&] {
      for (size_t i = 0; i < saved.size(); ++i) std::memcpy(results_[i].data, saved[i].data(), saved[i].size());
      saved.clear();
    };
    end_of_kernel_before = finish;
    waited = false;
    emulation::run_block(count, kernel);
    finish();
    end_of_kernel_before = nullptr;
  }

 private:
  std::vector<Memory> results_;
};

}  // namespace emulation
