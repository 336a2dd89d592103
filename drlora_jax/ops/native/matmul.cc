#include "matmul.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

namespace drlora {
namespace {

constexpr int kThinRows = 12;  // of a tile that is one vector wide: as many sums as hide latencies

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
#pragma GCC unroll 12
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
  if (rows > kRows) return tile<kThinRows, 1, kTransposed>;
  switch (rows) {
    case 1:
      return tile_of<kTransposed, 1>(vectors);
    case 2:
      return tile_of<kTransposed, 2>(vectors);
    case 3:
      return tile_of<kTransposed, 3>(vectors);
    case 4:
      return tile_of<kTransposed, 4>(vectors);
    case 5:
      return tile_of<kTransposed, 5>(vectors);
    default:
      return tile_of<kTransposed, 6>(vectors);
  }
}

// The source of the next panel, prefetched while the present one is multiplied.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const Right& right, int64_t depth, int64_t first, int64_t columns) : stride_(right.stride) {
    const int64_t wide = std::min<int64_t>(kPanel, columns - first);
    const int64_t deep = std::min<int64_t>(kDepth, depth);
    next_ = right.data + first * (right.is_transposed ? right.stride : 1);
    lines_ = (right.is_transposed ? deep : wide) / kLine;
    rows_ = lines_ == 0 ? 0 : right.is_transposed ? wide : deep;
  }
  int64_t lines() const { return rows_ * lines_; }
  void bring(int64_t count) {
    for (; count > 0 && rows_ > 0; --count) {
      __builtin_prefetch(next_ + line_ * kLine, 0, 2);
      if (++line_ < lines_) continue;
      line_ = 0;
      next_ += stride_;
      --rows_;
    }
  }

 private:
  static constexpr int64_t kLine = 16;  // floats
  const float* next_ = nullptr;         // row
  int64_t stride_ = 0, rows_ = 0, lines_ = 0, line_ = 0;
};

// All rows of one panel, packed or in place with `stride` between its rows.
template <bool kTransposed>
void multiply_panel(int64_t rows, const Segment* segments, int count, const float* panel,
                    int64_t stride, const Out& out, int64_t first, int columns, bool adds,
                    Ahead ahead = {}) {
  if (rows == 0) return;
  const int64_t share = ahead.lines() * kRows / rows + 1;
  const int vectors = (columns + kLanes - 1) / kLanes;
  float* at[kThinRows];
  int some = 0;
  for (int64_t row = 0; row < rows; row += some) {
    const bool is_thin = vectors == 1 && rows - row >= kThinRows;
    some = is_thin ? kThinRows : static_cast<int>(std::min<int64_t>(kRows, rows - row));
    for (int i = 0; i < some; ++i) at[i] = out.row(row + i);
    ahead.bring(share);
    tile_of<kTransposed>(some, vectors)(segments, count, row, panel, stride, at, first, columns,
                                        adds);
  }
}

float* panel_buffer() {
  struct alignas(64) Panel {
    float values[kDepth * kPanel];
  };
  static thread_local const auto panel = std::make_unique<Panel>();
  return panel->values;
}

}  // namespace

void pack(const Right& right, int64_t start, int64_t depth, int64_t first, int columns, int width,
          float* panel) {
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
        for (int row = 0; row < kLanes; ++row)
          rows[row] = load(data + (at + row) * right.stride + k);
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
              bool adds, const Next& next) {
  if (rows == 0) return;
  float* panel = panel_buffer();
  for (int64_t first = 0; first < columns; first += kPanel) {
    const int some = static_cast<int>(std::min<int64_t>(kPanel, columns - first));
    const int width = static_cast<int>(round_up(some, kLanes));
    bool is_begun = adds;
    Segment segments[8];
    int filled = 0;
    int64_t depth = 0;
    const int64_t after = first + kPanel;
    const Ahead ahead = after < columns ? Ahead(terms[0].right, terms[0].depth, after, columns)
                                        : Ahead(next.right, next.depth, 0, next.columns);
    const auto flush = [&] {
      multiply_panel<false>(rows, segments, filled, panel, width, out, first, some, is_begun,
                            ahead);
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

void add_gram(int64_t rows, int64_t columns, int64_t depth, const Rows& left, const Rows& right,
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
