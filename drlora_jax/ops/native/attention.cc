// Causal attention over packed rows, forward and backward, in float32.
//
// A block of queries is multiplied with the keys from the first one that its documents or its
// window can reach up to its own last one: the scores of a block stay in the cache, and those of a
// row never exist at once. A task is one head of one row, in the backward pass one key-value head
// with all its query heads, so the order of summation is fixed.
//
// Equations are those of ops/attention/chunked.py. B rows, T positions, N heads, G key-value heads.

#include <algorithm>
#include <cmath>
#include <vector>

#include "matmul.h"
#include "threads.h"

namespace drlora {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kBlock = 48;     // queries
constexpr float kUnseen = -1e30f;  // the score of a masked key

struct Attention {
  int64_t rows, length, heads, groups, head_width, value_width;
  const float *q, *k, *v;  // [B, T, N, H], [B, T, G, H], [B, T, G, V]
  const int32_t *segments, *positions;
  float scale, cap;  // cap 0: none
  int64_t window;    // keys that a query attends to, itself included

  int64_t keys() const { return round_up(length, kPanel); }  // with padding
};

// What decides which queries of a row attend to which keys; padding keys belong to no document.
struct Row {
  std::vector<int32_t> segments, positions;
  std::vector<int64_t> first;  // first key that a query may attend to

  Row(const Attention& problem, int64_t row) {
    const int64_t length = problem.length;
    const int32_t* ids = problem.segments + row * length;
    const int32_t* at = problem.positions + row * length;
    segments.assign(ids, ids + length);
    positions.assign(at, at + length);
    segments.resize(problem.keys(), -1);
    positions.resize(problem.keys(), 0);
    first.resize(length);
    for (int64_t i = 0; i < length; ++i) {
      const int64_t reach = std::min<int64_t>(at[i], problem.window - 1);
      first[i] = std::max<int64_t>(i - reach, 0);
    }
  }
};

// Queries [start, stop) and the keys [low, high) that they may attend to, whole panels.
struct Block {
  int64_t start, stop, low, high;
};

template <typename Visit>
void each_block(const Attention& problem, const Row& row, const Visit& visit) {
  for (int64_t start = 0; start < problem.length; start += kBlock) {
    const int64_t stop = std::min(start + kBlock, problem.length);
    const int64_t low =
        *std::min_element(row.first.begin() + start, row.first.begin() + stop) / kPanel * kPanel;
    visit(Block{start, stop, low, round_up(stop, kPanel)});
  }
}

// All panels of a right operand [depth, columns], one after the other.
struct Panels {
  std::vector<float> memory;
  int64_t depth = 0, columns = 0;

  // Padded with rows of zeros.
  void fill(const Right& right, int64_t rows, int64_t all_rows, int64_t all_columns) {
    depth = all_rows;
    columns = all_columns;
    memory.resize(depth * round_up(columns, kPanel));
    for (int64_t first = 0; first < columns; first += kPanel) {
      const int some = static_cast<int>(std::min<int64_t>(kPanel, columns - first));
      float* panel = memory.data() + first * depth;
      pack(right, 0, rows, first, some, kPanel, panel);
      std::memset(panel + rows * kPanel, 0, (depth - rows) * kPanel * sizeof(float));
    }
  }
  const float* at(int64_t first, int64_t row = 0) const {
    return memory.data() + first * depth + row * kPanel;
  }
};

// Scores of a block's queries, [queries, high - low], not yet scaled.
void product_with_keys(const Rows& left, int64_t rows, int64_t depth, const Panels& keys,
                       const Block& block, float* out, int64_t stride) {
  const Segment segment = {left, depth};
  for (int64_t first = block.low; first < block.high; first += kPanel) {
    multiply_packed(rows, segment, keys.at(first), {out, stride}, first - block.low, kPanel);
  }
}

// left [rows, keys of the block] times values or keys [keys, columns].
void product_over_keys(const float* left, int64_t stride, int64_t rows, const Panels& right,
                       const Block& block, const Out& out) {
  const Segment segment = {{left, stride}, block.high - block.low};
  for (int64_t first = 0; first < right.columns; first += kPanel) {
    const int some = static_cast<int>(std::min<int64_t>(kPanel, right.columns - first));
    multiply_packed(rows, segment, right.at(first, block.low), out, first, some);
  }
}

IntVec is_seen(const Attention& problem, const Row& row, int64_t query, int64_t key) {
  const IntVec ages = row.positions[query] - load(row.positions.data() + key);
  return (load(row.segments.data() + key) == row.segments[query]) & (ages >= 0) &
         (ages < static_cast<int32_t>(problem.window));
}

Vec scaled(const Attention& problem, Vec score, Vec* slope) {
  score *= problem.scale;
  if (problem.cap == 0) return score;
  const Vec turned = 1.0f - 2.0f / (exp(score * (2.0f / problem.cap)) + 1.0f);
  if (slope != nullptr) *slope = 1.0f - turned * turned;
  return problem.cap * turned;
}

// Scratch memory of a core, reused between calls.
struct Workspace {
  std::vector<float> scores, d_scores, queries, d_out;
  Panels keys, values, keys_by_row, values_by_column;

  static Workspace& of_this_thread() {
    static thread_local Workspace workspace;
    return workspace;
  }
};

// One head of one row of an array [B, T, heads, width].
struct Head {
  int64_t offset, stride;

  Head(const Attention& problem, int64_t row, int64_t head, int64_t heads, int64_t width)
      : offset(row * problem.length * heads * width + head * width), stride(heads * width) {}
};

// --------------------------------------------------------------------------------------- forward

void forward(const Attention& problem, ffi::ThreadPool& pool, const float* sinks, float* out,
             float* lse) {
  const int64_t length = problem.length, heads = problem.heads, groups = problem.groups;
  const int64_t head_width = problem.head_width, value_width = problem.value_width;
  parallel(pool, problem.rows * heads, [&](int64_t task) {
    const int64_t b = task / heads, n = task % heads, g = n / (heads / groups);
    const Head q(problem, b, n, heads, head_width), o(problem, b, n, heads, value_width);
    const Head k(problem, b, g, groups, head_width), v(problem, b, g, groups, value_width);
    Workspace& work = Workspace::of_this_thread();
    const Row row(problem, b);
    work.keys.fill({problem.k + k.offset, k.stride, true}, head_width, head_width, length);
    work.values.fill({problem.v + v.offset, v.stride}, length, problem.keys(), value_width);
    const int64_t stride = problem.keys() + kLanes;
    work.scores.resize(kBlock * stride);
    float* scores = work.scores.data();
    each_block(problem, row, [&](const Block& block) {
      const int64_t queries = block.stop - block.start, keys = block.high - block.low;
      const Rows left = {problem.q + q.offset + block.start * q.stride, q.stride};
      product_with_keys(left, queries, head_width, work.keys, block, scores, stride);
      float totals[kBlock];
      for (int64_t i = 0; i < queries; ++i) {
        float* of_query = scores + i * stride;
        const int64_t query = block.start + i;
        Vec tops = all(kUnseen);
        for (int64_t j = 0; j < keys; j += kLanes) {
          const Vec score = scaled(problem, load(of_query + j), nullptr);
          const Vec seen = is_seen(problem, row, query, block.low + j) ? score : all(kUnseen);
          tops = seen > tops ? seen : tops;
          store(of_query + j, seen);
        }
        // A sink is a score that has no value.
        float top = std::max(sinks[n], kUnseen);
        for (int lane = 0; lane < kLanes; ++lane) top = std::max(top, tops[lane]);
        Vec sums = {};
        for (int64_t j = 0; j < keys; j += kLanes) {
          const Vec score = load(of_query + j);
          const Vec weight = score <= kUnseen ? Vec{} : exp(score - top);
          sums += weight;
          store(of_query + j, weight);
        }
        totals[i] = sum(sums) + (sinks[n] > kUnseen ? std::exp(sinks[n] - top) : 0.0f);
        lse[(b * heads + n) * length + query] = top + std::log(totals[i]);
      }
      float* results = out + o.offset + block.start * o.stride;
      product_over_keys(scores, stride, queries, work.values, block, {results, o.stride});
      for (int64_t i = 0; i < queries; ++i) {
        for (int64_t at = 0; at < value_width; ++at) results[i * o.stride + at] /= totals[i];
      }
    });
  });
}

// -------------------------------------------------------------------------------------- backward

// Rows of a head, padded with zeros to whole panels.
void copy_rows(const float* from, int64_t stride, int64_t rows, int64_t width, float* to) {
  const int64_t wide = round_up(width, kPanel);
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(to + i * wide, from + i * stride, width * sizeof(float));
    std::memset(to + i * wide + width, 0, (wide - width) * sizeof(float));
  }
}

struct Cotangents {
  float *q, *k, *v;
};

void backward(const Attention& problem, ffi::ThreadPool& pool, const float* out, const float* lse,
              const float* d_out, const Cotangents& d) {
  const int64_t length = problem.length, heads = problem.heads, groups = problem.groups;
  const int64_t head_width = problem.head_width, value_width = problem.value_width;
  const int64_t members = heads / groups;
  parallel(pool, problem.rows * groups, [&](int64_t task) {
    const int64_t b = task / groups, g = task % groups;
    const Head k(problem, b, g, groups, head_width), v(problem, b, g, groups, value_width);
    Workspace& work = Workspace::of_this_thread();
    const Row row(problem, b);
    const float *keys_of = problem.k + k.offset, *values_of = problem.v + v.offset;
    work.keys.fill({keys_of, k.stride, true}, head_width, head_width, length);
    work.keys_by_row.fill({keys_of, k.stride}, length, problem.keys(), head_width);
    work.values_by_column.fill({values_of, v.stride, true}, value_width, value_width, length);
    const int64_t stride = problem.keys() + kLanes;
    work.scores.resize(kBlock * stride);
    work.d_scores.resize(kBlock * stride);
    const int64_t q_wide = round_up(head_width, kPanel), o_wide = round_up(value_width, kPanel);
    work.queries.resize(kBlock * q_wide);
    work.d_out.resize(kBlock * o_wide);
    float *weights = work.scores.data(), *d_scores = work.d_scores.data();
    for (int64_t t = 0; t < length; ++t) {
      std::memset(d.k + k.offset + t * k.stride, 0, head_width * sizeof(float));
      std::memset(d.v + v.offset + t * v.stride, 0, value_width * sizeof(float));
    }
    for (int64_t n = g * members; n < (g + 1) * members; ++n) {
      const Head q(problem, b, n, heads, head_width), o(problem, b, n, heads, value_width);
      each_block(problem, row, [&](const Block& block) {
        const int64_t queries = block.stop - block.start, keys = block.high - block.low;
        const int64_t q_first = q.offset + block.start * q.stride;
        const int64_t o_first = o.offset + block.start * o.stride;
        copy_rows(problem.q + q_first, q.stride, queries, head_width, work.queries.data());
        copy_rows(d_out + o_first, o.stride, queries, value_width, work.d_out.data());
        product_with_keys({work.queries.data(), q_wide}, queries, head_width, work.keys, block,
                          weights, stride);
        product_with_keys({work.d_out.data(), o_wide}, queries, value_width, work.values_by_column,
                          block, d_scores, stride);
        for (int64_t i = 0; i < queries; ++i) {
          const int64_t query = block.start + i;
          // The gradient through the softmax's normalisation, common to all scores of a query.
          float mean = 0;
          for (int64_t at = 0; at < value_width; ++at) {
            mean += d_out[o_first + i * o.stride + at] * out[o_first + i * o.stride + at];
          }
          const float total = lse[(b * heads + n) * length + query];
          float *weight_of = weights + i * stride, *d_score_of = d_scores + i * stride;
          for (int64_t j = 0; j < keys; j += kLanes) {
            Vec slope = all(1.0f);
            const Vec score = scaled(problem, load(weight_of + j), &slope);
            const IntVec seen = is_seen(problem, row, query, block.low + j);
            const Vec weight = seen ? exp(score - total) : Vec{};
            const Vec back = problem.scale * weight * (load(d_score_of + j) - mean) * slope;
            store(weight_of + j, weight);
            store(d_score_of + j, back);
          }
        }
        product_over_keys(d_scores, stride, queries, work.keys_by_row, block,
                          {d.q + q_first, q.stride});
        const int64_t real = std::min(block.high, length) - block.low;
        add_gram(real, head_width, queries, {d_scores, stride}, {work.queries.data(), q_wide},
                 {d.k + k.offset + block.low * k.stride, k.stride});
        add_gram(real, value_width, queries, {weights, stride}, {work.d_out.data(), o_wide},
                 {d.v + v.offset + block.low * v.stride, v.stride});
      });
    }
  });
}

// ------------------------------------------------------------------------------------------- XLA

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using Result = ffi::ResultBuffer<ffi::F32>;

Attention problem_of(const Floats& q, const Floats& k, const Floats& v, const Ints& segments,
                     const Ints& positions, float scale, float cap, int64_t window) {
  const auto sizes = q.dimensions(), kv = v.dimensions();
  return {sizes[0],
          sizes[1],
          sizes[2],
          kv[2],
          sizes[3],
          kv[3],
          q.typed_data(),
          k.typed_data(),
          v.typed_data(),
          segments.typed_data(),
          positions.typed_data(),
          scale,
          cap,
          window};
}

ffi::Error run_forward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Ints segments,
                       Ints positions, Floats sinks, Result out, Result lse, float scale, float cap,
                       int64_t window) {
  forward(problem_of(q, k, v, segments, positions, scale, cap, window), pool, sinks.typed_data(),
          out->typed_data(), lse->typed_data());
  return ffi::Error::Success();
}

ffi::Error run_backward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Ints segments,
                        Ints positions, Floats out, Floats lse, Floats d_out, Result dq, Result dk,
                        Result dv, float scale, float cap, int64_t window) {
  backward(problem_of(q, k, v, segments, positions, scale, cap, window), pool, out.typed_data(),
           lse.typed_data(), d_out.typed_data(),
           {dq->typed_data(), dk->typed_data(), dv->typed_data()});
  return ffi::Error::Success();
}

}  // namespace
}  // namespace drlora

XLA_FFI_DEFINE_HANDLER_SYMBOL(DrloraAttentionForward, drlora::run_forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<drlora::Floats>()  // q
                                  .Arg<drlora::Floats>()  // k
                                  .Arg<drlora::Floats>()  // v
                                  .Arg<drlora::Ints>()    // segments
                                  .Arg<drlora::Ints>()    // positions
                                  .Arg<drlora::Floats>()  // sinks
                                  .Ret<drlora::Floats>()  // out
                                  .Ret<drlora::Floats>()  // lse
                                  .Attr<float>("scale")
                                  .Attr<float>("cap")
                                  .Attr<int64_t>("window"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(DrloraAttentionBackward, drlora::run_backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<drlora::Floats>()  // q
                                  .Arg<drlora::Floats>()  // k
                                  .Arg<drlora::Floats>()  // v
                                  .Arg<drlora::Ints>()    // segments
                                  .Arg<drlora::Ints>()    // positions
                                  .Arg<drlora::Floats>()  // out
                                  .Arg<drlora::Floats>()  // lse
                                  .Arg<drlora::Floats>()  // d_out
                                  .Ret<drlora::Floats>()  // dq
                                  .Ret<drlora::Floats>()  // dk
                                  .Ret<drlora::Floats>()  // dv
                                  .Attr<float>("scale")
                                  .Attr<float>("cap")
                                  .Attr<int64_t>("window"));
