// Types of experts.cc: the slots sorted by expert and divided among parts, the weights and LoRA
// matrices, and the scratch memory of a core.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "matmul.h"

namespace drlora {

constexpr int kRoles = 4, kDown = 3;  // gate, up, gate_up, down
// Rows of an expert that are processed together: as many as fit a core's memory, within bounds.
constexpr int64_t kMostRows = 512, kFewestRows = 96;
constexpr int64_t kCoreMemory = 4 << 20;  // floats

inline int64_t padded(int64_t width) { return round_up(width, kPanel) + kPanel; }

// As `drop` of ops/experts/shared.py: what is dropped follows from (slot, column) and a role's
// seeds.
struct Dropout {
  bool is_on;
  uint32_t threshold;
  float kept_share;
  const uint32_t* seeds;      // [roles, 2]: rows, columns
  const int32_t* first_slot;  // of every token, in the whole batch
};

struct Role {
  const float *a, *b, *gate;  // [E, R, D_in], [E, R, D_out], [E, R]
  int64_t ranks, in, out;

  // The offset of an expert's rank rows, which are contiguous.
  const float* a_of(int64_t expert) const { return a + expert * ranks * in; }
  const float* b_of(int64_t expert) const { return b + expert * ranks * out; }
  const float* gate_of(int64_t expert) const { return gate + expert * ranks; }
  int64_t active(int64_t expert) const {  // up to the last nonzero gate
    int64_t count = ranks;
    while (count > 0 && gate_of(expert)[count - 1] == 0.0f) --count;
    return count;
  }
};

struct RoleGradients {
  float *a, *b, *gate;  // of one expert
};

struct Problem {
  int64_t tokens, choices, experts, width, hidden, parts;
  const float* x;
  const int32_t* expert;
  const float* weight;
  const float *gate_up, *down;  // of this layer
  Role roles[kRoles];
  float scale;
  bool is_gelu;
  Dropout dropout;

  std::vector<int64_t> start;  // of every expert's slots, and the end of the last
  std::vector<int32_t> order;  // sorted slots

  void sort() {
    start.assign(experts + 1, 0);
    const int64_t slots = tokens * choices;
    const auto is_here = [&](int32_t e) { return e >= 0 && e < experts; };
    for (int64_t slot = 0; slot < slots; ++slot) {
      if (is_here(expert[slot])) ++start[expert[slot] + 1];
    }
    for (int64_t e = 0; e < experts; ++e) start[e + 1] += start[e];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    order.resize(start[experts]);
    for (int64_t slot = 0; slot < slots; ++slot) {
      if (is_here(expert[slot])) order[next[expert[slot]]++] = static_cast<int32_t>(slot);
    }
  }

  // Weights of an expert as right operands. An index past the last expert is never multiplied with,
  // but may be requested for prefetching.
  Right gate_up_of(int64_t e, int64_t half, bool is_transposed) const {
    const int64_t stride = 2 * hidden;
    return {gate_up + std::min(e, experts - 1) * width * stride + half * hidden, stride,
            is_transposed};
  }
  Right down_of(int64_t e, bool is_transposed) const {
    return {down + std::min(e, experts - 1) * hidden * width, width, is_transposed};
  }

  int64_t part_start(int64_t part) const { return start[experts] * part / parts; }

  // The expert of a part's first slot if an earlier part began it, else -1.
  int64_t shared_expert(int64_t part) const {
    const int64_t first = part_start(part);
    if (first == part_start(part + 1)) return -1;
    const auto after = std::upper_bound(start.begin(), start.end(), first);
    const int64_t e = after - start.begin() - 1;
    return start[e] < first ? e : -1;
  }

  int64_t gradient_size() const {  // all LoRA matrices of one expert
    int64_t size = 0;
    for (const Role& role : roles) size += role.ranks * (role.in + role.out + 1);
    return size;
  }
};

// Some sorted slots of one expert.
struct Chunk {
  int64_t expert, first, rows;
};

// Calls visit(chunk) for all slots of a part, in sorted order.
template <typename Visit>
void each_chunk(const Problem& problem, int64_t part, int64_t most_rows, const Visit& visit) {
  int64_t at = problem.part_start(part);
  const int64_t end = problem.part_start(part + 1);
  for (int64_t e = 0; e < problem.experts; ++e) {
    const int64_t stop = std::min(end, problem.start[e + 1]);
    if (at >= stop) continue;
    const int64_t chunks = (stop - at + most_rows - 1) / most_rows, rows = stop - at;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t from = at + rows * c / chunks;
      visit(Chunk{e, from, at + rows * (c + 1) / chunks - from});
    }
    at = stop;
  }
}

// Scratch memory of a core: arrays of up to `most_rows`, reused between calls.
struct Workspace {
  std::vector<float> memory;
  int64_t most_rows;
  float *x, *dy, *gate_up, *d_gate_up, *hidden, *d_hidden, *z[kRoles], *dz[kRoles];
  float* dropped;  // as wide as x or as h
  int64_t x_stride, gate_up_stride, hidden_stride, dropped_stride, z_stride[kRoles];
  std::vector<float*> rows;

  void fit(const Problem& problem) {
    x_stride = padded(problem.width);
    gate_up_stride = padded(2 * problem.hidden);
    hidden_stride = padded(problem.hidden);
    dropped_stride = problem.dropout.is_on ? std::max(x_stride, hidden_stride) : 0;
    int64_t wanted = 2 * x_stride + 2 * gate_up_stride + 2 * hidden_stride + dropped_stride;
    for (int r = 0; r < kRoles; ++r) {
      z_stride[r] = round_up(problem.roles[r].ranks, kLanes);
      wanted += 2 * z_stride[r];
    }
    most_rows = std::clamp(kCoreMemory / wanted, kFewestRows, kMostRows);
    if (static_cast<int64_t>(memory.size()) < wanted * most_rows) {
      memory.resize(wanted * most_rows);
    }
    float* next = memory.data();
    const auto take = [&](int64_t stride) {
      return std::exchange(next, next + stride * most_rows);
    };
    x = take(x_stride);
    dy = take(x_stride);
    gate_up = take(gate_up_stride);
    d_gate_up = take(gate_up_stride);
    hidden = take(hidden_stride);
    d_hidden = take(hidden_stride);
    dropped = take(dropped_stride);
    for (int r = 0; r < kRoles; ++r) {
      z[r] = take(z_stride[r]);
      dz[r] = take(z_stride[r]);
    }
    rows.resize(most_rows);
  }

  static Workspace& of_this_thread(const Problem& problem) {
    static thread_local Workspace workspace;
    workspace.fit(problem);
    return workspace;
  }
};

}  // namespace drlora
