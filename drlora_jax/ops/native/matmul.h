// Matrix products of float32 on one core, for operands that stay in its cache.
//
// A product is computed in tiles of kRows x kPanel results that are kept in registers. The right
// operand is copied panel by panel into the order in which tiles read it; the left one is read in
// place. A product may have several terms, sum_i left_i right_i, whose sums never leave the
// registers: this is how LoRA is added to the product with the weights. Every result is a sum over
// the depth in order, so it does not depend on which rows are computed together.

#pragma once

#include "vectors.h"

namespace drlora {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectors = 4;  // 6 x 4 sums in 32 registers
#else
constexpr int kVectors = 2;  // 6 x 2 in 16
#endif
constexpr int kRows = 6;
constexpr int kPanel = kLanes * kVectors;
constexpr int kDepth = 1024;  // of a packed panel: a quarter of a megabyte

inline int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// A matrix [depth, columns] in memory, or transposed, [columns, depth].
struct Right {
  const float* data;
  int64_t stride;
  bool is_transposed = false;
};

// Rows in memory.
struct Rows {
  const float* data;
  int64_t stride;
};

struct Segment {  // the part of a term in one panel
  Rows left;
  int64_t depth;
};

// Rows of results: a matrix, or rows anywhere.
struct Out {
  float* data = nullptr;
  int64_t stride = 0;
  float* const* rows = nullptr;

  float* row(int64_t index) const { return rows != nullptr ? rows[index] : data + index * stride; }
};

struct Term {
  Rows left;
  Right right;
  int64_t depth;
};

// The right operand of the following product, which is prefetched.
struct Next {
  Right right = {};
  int64_t depth = 0, columns = 0;
};

// out[:, 0:columns] (+)= sum over terms of left [rows, depth] right [depth, columns].
void multiply(int64_t rows, int64_t columns, const Term* terms, int count, const Out& out,
              bool adds, const Next& next = {});

// out [rows, columns] += left [depth, rows]^T right [depth, columns]. Rows of `right` may be read
// up to the next multiple of kPanel columns.
void add_gram(int64_t rows, int64_t columns, int64_t depth, const Rows& left, const Rows& right,
              const Out& out);

// Columns [first, first + columns) of `depth` rows of the right operand from row `start`, as
// [depth, width], padded with zeros.
void pack(const Right& right, int64_t start, int64_t depth, int64_t first, int columns, int width,
          float* panel);

// out[:, first:first + columns] = left [rows, depth] times a panel [depth, kPanel].
void multiply_packed(int64_t rows, const Segment& left, const float* panel, const Out& out,
                     int64_t first, int columns);

}  // namespace drlora
