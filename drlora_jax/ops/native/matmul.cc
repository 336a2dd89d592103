#include "matmul.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace drlora {
namespace {

// Lanes of `a` where bit `Step` of the lane is 0, else those of `b` (kHigh: the upper halves).
template <int Step, bool kHigh, int... lane>
inline Vec merge_lanes(Vec a, Vec b, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(
      a, b, ((lane & Step) ? kLanes + lane - (kHigh ? 0 : Step) : lane + (kHigh ? Step : 0))...);
#else
  const IntVec order = {
      ((lane & Step) ? kLanes + lane - (kHigh ? 0 : Step) : lane + (kHigh ? Step : 0))...};
  return __builtin_shuffle(a, b, order);
#endif
}

template <int Step>
inline void transpose_steps(Vec* rows) {
  using Lanes = std::make_integer_sequence<int, kLanes>;
#pragma GCC unroll 16
  for (int row = 0; row < kLanes; ++row) {
    if (row & Step) continue;
    Vec a = rows[row], b = rows[row + Step];
    rows[row] = merge_lanes<Step, false>(a, b, Lanes{});
    rows[row + Step] = merge_lanes<Step, true>(a, b, Lanes{});
  }
  if constexpr (Step > 1) transpose_steps<Step / 2>(rows);
}

// out rows [M] (+)= sum over segments of left rows x panel, for `columns` <= V * kLanes of them.
template <int M, int V, bool kTransposed>
void tile(const Segment* segments, int count, int64_t row, const float* panel, int64_t stride,
          float* const* out, int64_t first, int columns, bool adds) {
  Vec sums[M][V] = {};
  for (int s = 0; s < count; ++s) {
    const int64_t ld = segments[s].left.stride;
    const float* left = segments[s].left.data + (kTransposed ? row : row * ld);
    for (int64_t k = 0; k < segments[s].depth; ++k) {
      Vec right[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) right[v] = load(panel + v * kLanes);
#pragma GCC unroll 6
      for (int i = 0; i < M; ++i) {
        const float value = kTransposed ? left[i] : left[i * ld];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[i][v] += value * right[v];
      }
      panel += stride;
      left += kTransposed ? ld : 1;
    }
  }
  for (int i = 0; i < M; ++i) {
    float* to = out[i] + first;
    if (columns == V * kLanes) {
      for (int v = 0; v < V; ++v) {
        store(to + v * kLanes, adds ? load(to + v * kLanes) + sums[i][v] : sums[i][v]);
      }
    } else {
      float row_sums[V * kLanes];
      std::memcpy(row_sums, sums[i], sizeof row_sums);
      for (int at = 0; at < columns; ++at) to[at] = row_sums[at] + (adds ? to[at] : 0.0f);
    }
  }
}

using Tile = void (*)(const Segment*, int, int64_t, const float*, int64_t, float* const*, int64_t,
                      int, bool);

template <bool kTransposed, int M>
constexpr Tile tile_of(int vectors) {
  if constexpr (kVectors > 2) {
    if (vectors == 3) return tile<M, 3, kTransposed>;
    if (vectors == 4) return tile<M, 4, kTransposed>;
  }
  return vectors == 1 ? tile<M, 1, kTransposed> : tile<M, 2, kTransposed>;
}

template <bool kTransposed>
Tile tile_of(int rows, int vectors) {
  switch (rows) {
    case 1: return tile_of<kTransposed, 1>(vectors);
    case 2: return tile_of<kTransposed, 2>(vectors);
    case 3: return tile_of<kTransposed, 3>(vectors);
    case 4: return tile_of<kTransposed, 4>(vectors);
    case 5: return tile_of<kTransposed, 5>(vectors);
    default: return tile_of<kTransposed, 6>(vectors);
  }
}

// All rows of one panel, packed or as it lies with `stride` between its rows.
template <bool kTransposed>
void multiply_panel(int64_t rows, const Segment* segments, int count, const float* panel,
                    int64_t stride, const Out& out, int64_t first, int columns, bool adds) {
  const int vectors = (columns + kLanes - 1) / kLanes;
  float* at[kRows];
  for (int64_t row = 0; row < rows; row += kRows) {
    const int some = static_cast<int>(std::min<int64_t>(kRows, rows - row));
    for (int i = 0; i < some; ++i) at[i] = out.row(row + i);
    tile_of<kTransposed>(some, vectors)(segments, count, row, panel, stride, at, first, columns,
                                        adds);
  }
}

inline float* panel_buffer() {
  static thread_local std::vector<float> buffer(kDepth * kPanel + kLanes);
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  return buffer.data() + (64 - address % 64) % 64 / sizeof(float);
}

}  // namespace

void pack(const Right& right, int64_t start, int64_t depth, int64_t first, int columns,
                 int width, float* panel) {
  if (!right.is_transposed) {
    for (int64_t k = 0; k < depth; ++k) {
      const float* from = right.data + (start + k) * right.stride + first;
      float* to = panel + k * width;
      if (columns == width) {
        for (int at = 0; at < width; at += kLanes) store(to + at, load(from + at));
      } else {
        std::memcpy(to, from, columns * sizeof(float));
        std::memset(to + columns, 0, (width - columns) * sizeof(float));
      }
    }
    return;
  }
  const float* data = right.data + first * right.stride + start;
  for (int at = 0; at < width; at += kLanes) {
    int64_t k = 0;
    if (at + kLanes <= columns) {
      for (; k + kLanes <= depth; k += kLanes) {
        Vec rows[kLanes];
#pragma GCC unroll 16
        for (int row = 0; row < kLanes; ++row) rows[row] = load(data + (at + row) * right.stride + k);
        transpose_steps<kLanes / 2>(rows);
#pragma GCC unroll 16
        for (int row = 0; row < kLanes; ++row) store(panel + (k + row) * width + at, rows[row]);
      }
    }
    for (; k < depth; ++k) {
      for (int lane = at; lane < at + kLanes; ++lane) {
        panel[k * width + lane] = lane < columns ? data[lane * right.stride + k] : 0.0f;
      }
    }
  }
}

void multiply(int64_t rows, int64_t columns, const Term* terms, int count, const Out& out,
                     bool adds) {
  if (rows == 0) return;
  float* panel = panel_buffer();
  for (int64_t first = 0; first < columns; first += kPanel) {
    const int some = static_cast<int>(std::min<int64_t>(kPanel, columns - first));
    const int width = static_cast<int>(round_up(some, kLanes));
    bool is_begun = adds;
    Segment segments[8];
    int filled = 0;
    int64_t depth = 0;
    const auto flush = [&] {
      multiply_panel<false>(rows, segments, filled, panel, width, out, first, some, is_begun);
      is_begun = true;
      filled = 0;
      depth = 0;
    };
    for (int t = 0; t < count; ++t) {
      int64_t start = 0;
      while (start < terms[t].depth) {
        const int64_t part = std::min<int64_t>(kDepth - depth, terms[t].depth - start);
        pack(terms[t].right, start, part, first, some, width, panel + depth * width);
        segments[filled++] = {{terms[t].left.data + start, terms[t].left.stride}, part};
        depth += part;
        start += part;
        if (depth == kDepth || filled == 8) flush();
      }
    }
    if (filled > 0 || !is_begun) flush();
  }
}

void add_gram(int64_t rows, int64_t columns, int64_t depth, const Left& left, const Left& right,
              const Out& out) {
  const Segment segment = {left, depth};
  for (int64_t first = 0; first < columns; first += kPanel) {
    const int some = static_cast<int>(std::min<int64_t>(kPanel, columns - first));
    multiply_panel<true>(rows, &segment, 1, right.data + first, right.stride, out, first, some,
                         true);
  }
}

void multiply_packed(int64_t rows, const Segment& left, const float* panel, const Out& out,
                     int64_t first, int columns) {
  multiply_panel<false>(rows, &left, 1, panel, kPanel, out, first, columns, false);
}

}  // namespace drlora
