// Gated expert MLPs with LoRA matrices, forward and backward, for frozen float32 weights.
//
// Slots ((token, expert) assignments) are sorted by expert. Every part gets an equal range of them
// and processes its experts one after another: the rows of an expert are gathered, multiplied with
// weights and active ranks read directly from the stacks, and added to the part's own sums over
// experts. There are no padding rows, load skew costs nothing, the cost follows the active ranks,
// and results depend only on the number of parts. An expert that is shared by several parts has
// partial gradients, which are summed in the order of the parts.
//
// Equations and letters are those of ops/experts/api.py and ops/experts/block.py.

#include "experts.h"

#include <cmath>
#include <utility>
#include <vector>

#include "matmul.h"
#include "threads.h"

namespace drlora {
namespace {

namespace ffi = xla::ffi;

// ------------------------------------------------------------------------------ element by element

// lowbias32
template <typename Bits>
Bits hash(Bits x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

struct Activated {
  Vec value, slope;
};

Activated activate(Vec x, bool is_gelu) {
  if (!is_gelu) {  // silu
    const Vec gate = 1.0f / (1.0f + exp(-x));
    return {x * gate, gate * (1.0f + x * (1.0f - gate))};
  }
  // The tanh form of gelu.
  const float c = 0.7978845608028654f, cubic = 0.044715f;
  const Vec turned = 1.0f - 2.0f / (exp(2.0f * c * (x + cubic * x * x * x)) + 1.0f);
  const Vec slope = c * (1.0f + 3.0f * cubic * x * x);
  return {0.5f * x * (1.0f + turned),
          0.5f * (1.0f + turned) + 0.5f * x * (1.0f - turned * turned) * slope};
}

// ------------------------------------------------------------------------------------------ chunks

int64_t token_of(const Problem& problem, const Chunk& chunk, int64_t row) {
  return problem.order[chunk.first + row] / problem.choices;
}

void gather(const Problem& problem, const Chunk& chunk, const float* from, float* to,
            int64_t stride) {
  for (int64_t row = 0; row < chunk.rows; ++row) {
    std::memcpy(to + row * stride, from + token_of(problem, chunk, row) * problem.width,
                problem.width * sizeof(float));
  }
}

// Rows of [T, D] at the chunk's tokens.
Out at_tokens(const Problem& problem, const Chunk& chunk, float* sums, Workspace& work) {
  for (int64_t row = 0; row < chunk.rows; ++row) {
    work.rows[row] = sums + token_of(problem, chunk, row) * problem.width;
  }
  Out out;
  out.rows = work.rows.data();
  return out;
}

// Rows after dropout; `to` may be `from`.
void drop(const Problem& problem, const Chunk& chunk, int r, const float* from, int64_t from_stride,
          float* to, int64_t to_stride) {
  const Dropout& dropout = problem.dropout;
  const int64_t width = problem.roles[r].in;
  const uint32_t row_seed = dropout.seeds[2 * r], column_seed = dropout.seeds[2 * r + 1];
  typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
  Bits lanes;
  for (uint32_t lane = 0; lane < kLanes; ++lane) lanes[lane] = lane * 0x9E3779B9u + column_seed;
  for (int64_t row = 0; row < chunk.rows; ++row) {
    const int32_t slot = problem.order[chunk.first + row];
    const int64_t token = slot / problem.choices;
    const auto number = static_cast<uint32_t>(dropout.first_slot[token] + slot % problem.choices);
    const uint32_t row_bits = hash(number ^ row_seed);
    for (int64_t at = 0; at < width; at += kLanes) {
      const Bits bits = hash((lanes + static_cast<uint32_t>(at) * 0x9E3779B9u) ^ row_bits);
      const Vec value = load(from + row * from_stride + at) / dropout.kept_share;
      store(to + row * to_stride + at, bits >= dropout.threshold ? value : Vec{});
    }
  }
}

// The input of a role's LoRA matrices, after dropout if there is any.
Rows factors_read(const Problem& problem, const Chunk& chunk, int r, const float* in,
                  int64_t stride, Workspace& work) {
  if (!problem.dropout.is_on || problem.roles[r].active(chunk.expert) == 0) return {in, stride};
  drop(problem, chunk, r, in, stride, work.dropped, work.dropped_stride);
  return {work.dropped, work.dropped_stride};
}

// z = in A^T, [rows, active ranks].
void low_rank(const Problem& problem, const Chunk& chunk, int r, Rows in, Workspace& work) {
  const Role& role = problem.roles[r];
  const Term term = {in, {role.a_of(chunk.expert), role.in, true}, role.in};
  multiply(chunk.rows, role.active(chunk.expert), &term, 1, {work.z[r], work.z_stride[r]}, false);
}

// The left operand of B: scale * gate * z.
void open_low_rank(const Problem& problem, const Chunk& chunk, int r, const float* in,
                   int64_t stride, Workspace& work) {
  low_rank(problem, chunk, r, factors_read(problem, chunk, r, in, stride, work), work);
  const Role& role = problem.roles[r];
  const float* gate = role.gate_of(chunk.expert);
  const int64_t active = role.active(chunk.expert);
  for (int64_t row = 0; row < chunk.rows; ++row) {
    float* z = work.z[r] + row * work.z_stride[r];
    for (int64_t k = 0; k < active; ++k) z[k] *= problem.scale * gate[k];
  }
}

// [gate | up], including LoRA.
void pre_activations(const Problem& problem, const Chunk& chunk, Workspace& work, Out out) {
  for (int r = 0; r < kDown; ++r) {
    open_low_rank(problem, chunk, r, work.x, work.x_stride, work);
  }
  const int64_t hidden = problem.hidden, e = chunk.expert;
  for (int half = 0; half < 2; ++half) {
    const Right weights = problem.gate_up_of(e, half, false);
    Term terms[3] = {{{work.x, work.x_stride}, weights, problem.width}};
    int count = 1;
    for (int r : {half, 2}) {
      const Role& role = problem.roles[r];
      const float* b = role.b_of(chunk.expert) + (r == 2 ? half * hidden : 0);
      terms[count++] = {{work.z[r], work.z_stride[r]}, {b, role.out}, role.active(chunk.expert)};
    }
    const Next up = {problem.gate_up_of(e, 1, false), problem.width, hidden};
    const Next down = {problem.down_of(e, false), hidden, problem.width};
    multiply(chunk.rows, hidden, terms, count, {out.data + half * hidden, out.stride}, false,
             half == 0 ? up : down);
  }
}

// h = act(gate) * up * p. With `keeps` the act and its slope are left where d[gate | up] will be.
void hide(const Problem& problem, const Chunk& chunk, const float* gate_up, int64_t stride,
          bool keeps, Workspace& work) {
  const int64_t hidden = problem.hidden;
  for (int64_t row = 0; row < chunk.rows; ++row) {
    const float p = problem.weight[problem.order[chunk.first + row]];
    const float* from = gate_up + row * stride;
    float* to = work.hidden + row * work.hidden_stride;
    float* kept = work.d_gate_up + row * work.gate_up_stride;
    for (int64_t at = 0; at < hidden; at += kLanes) {
      const int64_t some = hidden - at;
      const Activated gate = activate(load_some(from + at, some), problem.is_gelu);
      store(to + at, gate.value * load_some(from + hidden + at, some) * p);
      if (keeps) {
        store_some(kept + at, gate.value, some);
        store_some(kept + hidden + at, gate.slope, some);
      }
    }
  }
}

// sums [parts - 1, T, D] are added to those of the first part.
void add_parts(const Problem& problem, ffi::ThreadPool& pool, float* total, const float* sums) {
  const int64_t size = problem.tokens * problem.width, parts = problem.parts;
  if (parts == 1) return;
  parallel(pool, parts, [&](int64_t part) {
    const int64_t end = size * (part + 1) / parts;
    for (int64_t at = size * part / parts; at < end; at += kLanes) {
      Vec value = load_some(total + at, end - at);
      for (int64_t other = 0; other < parts - 1; ++other) {
        value += load_some(sums + other * size + at, end - at);
      }
      store_some(total + at, value, end - at);
    }
  });
}

float* sums_of(const Problem& problem, int64_t part, float* total, float* sums) {
  const int64_t size = problem.tokens * problem.width;
  float* own = part == 0 ? total : sums + (part - 1) * size;
  std::memset(own, 0, size * sizeof(float));
  return own;
}

// --------------------------------------------------------------------------------------- forward

void forward(Problem& problem, ffi::ThreadPool& pool, float* y, float* kept, float* sums) {
  problem.sort();
  parallel(pool, problem.parts, [&](int64_t part) {
    Workspace& work = Workspace::of_this_thread(problem);
    float* own = sums_of(problem, part, y, sums);
    each_chunk(problem, part, work.most_rows, [&](const Chunk& chunk) {
      gather(problem, chunk, problem.x, work.x, work.x_stride);
      Out gate_up = {work.gate_up, work.gate_up_stride};
      if (kept != nullptr) {
        gate_up = {kept + chunk.first * 2 * problem.hidden, 2 * problem.hidden};
      }
      pre_activations(problem, chunk, work, gate_up);
      hide(problem, chunk, gate_up.data, gate_up.stride, false, work);
      open_low_rank(problem, chunk, kDown, work.hidden, work.hidden_stride, work);
      const Role& role = problem.roles[kDown];
      const Term terms[] = {
          {{work.hidden, work.hidden_stride}, problem.down_of(chunk.expert, false), problem.hidden},
          {{work.z[kDown], work.z_stride[kDown]},
           {role.b_of(chunk.expert), role.out},
           role.active(chunk.expert)}};
      const Next next = {problem.gate_up_of(chunk.expert + 1, 0, false), problem.width,
                         problem.hidden};
      multiply(chunk.rows, problem.width, terms, 2, at_tokens(problem, chunk, own, work), true,
               next);
    });
  });
  add_parts(problem, pool, y, sums);
}

// -------------------------------------------------------------------------------------- backward

// Gradients of a role's LoRA matrices from its input and its output's cotangent; afterwards dz is
// the cotangent of z: scale * gate * (cotangent B^T).
void pull_low_rank(const Problem& problem, const Chunk& chunk, int r, const float* in,
                   int64_t in_stride, const float* d_out, int64_t out_stride,
                   const RoleGradients& grads, Workspace& work) {
  const Role& role = problem.roles[r];
  const int64_t active = role.active(chunk.expert), stride = work.z_stride[r];
  if (active == 0) return;
  const Rows read = factors_read(problem, chunk, r, in, in_stride, work);
  low_rank(problem, chunk, r, read, work);
  const Term term = {{d_out, out_stride}, {role.b_of(chunk.expert), role.out, true}, role.out};
  multiply(chunk.rows, active, &term, 1, {work.dz[r], stride}, false);
  const float* gate = role.gate_of(chunk.expert);
  std::vector<float> d_gate(active, 0.0f);
  for (int64_t row = 0; row < chunk.rows; ++row) {
    float *z = work.z[r] + row * stride, *dz = work.dz[r] + row * stride;
    for (int64_t k = 0; k < active; ++k) {
      const float back = problem.scale * dz[k];
      d_gate[k] += z[k] * back;
      z[k] *= problem.scale * gate[k];
      dz[k] = back * gate[k];
    }
  }
  for (int64_t k = 0; k < active; ++k) grads.gate[k] += d_gate[k];
  add_gram(active, role.in, chunk.rows, {work.dz[r], stride}, read, {grads.a, role.in});
  add_gram(active, role.out, chunk.rows, {work.z[r], stride}, {d_out, out_stride},
           {grads.b, role.out});
}

// The cotangent of the input of a role's LoRA matrices, as a term of the product with the base
// weights; with dropout it is added to `out` here, and the term is empty.
Term sent_back(const Problem& problem, const Chunk& chunk, int r, const Out& out, Workspace& work) {
  const Role& role = problem.roles[r];
  const Term term = {{work.dz[r], work.z_stride[r]},
                     {role.a_of(chunk.expert), role.in},
                     role.active(chunk.expert)};
  if (!problem.dropout.is_on || term.depth == 0) return term;
  const int64_t stride = work.dropped_stride;
  multiply(chunk.rows, role.in, &term, 1, {work.dropped, stride}, false);
  drop(problem, chunk, r, work.dropped, stride, work.dropped, stride);
  for (int64_t row = 0; row < chunk.rows; ++row) {
    float* to = out.row(row);
    for (int64_t at = 0; at < role.in; ++at) to[at] += work.dropped[row * stride + at];
  }
  return {term.left, term.right, 0};
}

// From dh, the act and its slope: d[gate | up] and d p.
void pull_hidden(const Problem& problem, const Chunk& chunk, const float* gate_up, int64_t stride,
                 float* d_weight, Workspace& work) {
  const int64_t hidden = problem.hidden;
  for (int64_t row = 0; row < chunk.rows; ++row) {
    const int32_t slot = problem.order[chunk.first + row];
    const float p = problem.weight[slot];
    const float* up_of = gate_up + row * stride + hidden;
    const float* dh = work.d_hidden + row * work.hidden_stride;
    float* to = work.d_gate_up + row * work.gate_up_stride;
    Vec d_p = {};
    for (int64_t at = 0; at < hidden; at += kLanes) {
      const int64_t some = hidden - at;
      const Vec act = load_some(to + at, some), slope = load_some(to + hidden + at, some);
      const Vec up = load_some(up_of + at, some), back = load_some(dh + at, some);
      d_p += back * act * up;
      store_some(to + at, back * up * p * slope, some);
      store_some(to + hidden + at, back * act * p, some);
    }
    d_weight[slot] = sum(d_p);
  }
}

void backward(Problem& problem, ffi::ThreadPool& pool, const float* dy, const float* kept,
              float* dx, float* d_weight, float* const (*grads)[3], float* sums, float* partials) {
  problem.sort();
  const int64_t parts = problem.parts, partial_size = problem.gradient_size();
  parallel(pool, parts, [&](int64_t part) {
    const auto clear = [&](float* array, int64_t size) {  // this part's share of it
      const int64_t from = size * part / parts, to = size * (part + 1) / parts;
      if (to > from) std::memset(array + from, 0, (to - from) * sizeof(float));
    };
    clear(d_weight, problem.tokens * problem.choices);
    clear(partials, (parts - 1) * partial_size);
    for (int r = 0; r < kRoles; ++r) {
      const Role& role = problem.roles[r];
      const int64_t ranks = problem.experts * role.ranks;
      clear(grads[r][0], ranks * role.in);
      clear(grads[r][1], ranks * role.out);
      clear(grads[r][2], ranks);
    }
  });
  const auto gradients_of = [&](int64_t expert, RoleGradients* of) {
    for (int r = 0; r < kRoles; ++r) {
      const Role& role = problem.roles[r];
      const int64_t first = expert * role.ranks;
      of[r] = {grads[r][0] + first * role.in, grads[r][1] + first * role.out, grads[r][2] + first};
    }
  };
  const auto partial_of = [&](int64_t part, RoleGradients* of) {
    float* next = partials + (part - 1) * partial_size;
    for (int r = 0; r < kRoles; ++r) {
      const Role& role = problem.roles[r];
      of[r].a = std::exchange(next, next + role.ranks * role.in);
      of[r].b = std::exchange(next, next + role.ranks * role.out);
      of[r].gate = std::exchange(next, next + role.ranks);
    }
  };
  parallel(pool, parts, [&](int64_t part) {
    Workspace& work = Workspace::of_this_thread(problem);
    float* own = sums_of(problem, part, dx, sums);
    const int64_t shared = problem.shared_expert(part), hidden = problem.hidden;
    each_chunk(problem, part, work.most_rows, [&](const Chunk& chunk) {
      RoleGradients of[kRoles];
      if (chunk.expert == shared) {
        partial_of(part, of);
      } else {
        gradients_of(chunk.expert, of);
      }
      gather(problem, chunk, problem.x, work.x, work.x_stride);
      gather(problem, chunk, dy, work.dy, work.x_stride);
      const float* gate_up = work.gate_up;
      int64_t stride = work.gate_up_stride;
      if (kept != nullptr) {
        gate_up = kept + chunk.first * 2 * hidden;
        stride = 2 * hidden;
      } else {
        pre_activations(problem, chunk, work, {work.gate_up, work.gate_up_stride});
      }
      hide(problem, chunk, gate_up, stride, true, work);
      pull_low_rank(problem, chunk, kDown, work.hidden, work.hidden_stride, work.dy, work.x_stride,
                    of[kDown], work);
      const Out d_hidden = {work.d_hidden, work.hidden_stride};
      const bool is_added = problem.dropout.is_on;
      if (is_added) {
        std::memset(work.d_hidden, 0, chunk.rows * work.hidden_stride * sizeof(float));
      }
      const Term to_hidden[] = {
          {{work.dy, work.x_stride}, problem.down_of(chunk.expert, true), problem.width},
          sent_back(problem, chunk, kDown, d_hidden, work)};
      const Right gate_up_weights = problem.gate_up_of(chunk.expert, 0, true);
      multiply(chunk.rows, hidden, to_hidden, 2, d_hidden, is_added,
               {gate_up_weights, 2 * hidden, problem.width});
      pull_hidden(problem, chunk, gate_up, stride, d_weight, work);
      const Out d_x = at_tokens(problem, chunk, own, work);
      Term to_x[1 + kDown] = {{{work.d_gate_up, work.gate_up_stride}, gate_up_weights, 2 * hidden}};
      for (int r = 0; r < kDown; ++r) {
        pull_low_rank(problem, chunk, r, work.x, work.x_stride,
                      work.d_gate_up + (r == 1 ? hidden : 0), work.gate_up_stride, of[r], work);
        to_x[1 + r] = sent_back(problem, chunk, r, d_x, work);
      }
      multiply(chunk.rows, problem.width, to_x, 1 + kDown, d_x, true,
               {problem.down_of(chunk.expert + 1, true), problem.width, hidden});
    });
  });
  add_parts(problem, pool, dx, sums);
  for (int64_t part = 1; part < parts; ++part) {
    const int64_t expert = problem.shared_expert(part);
    if (expert < 0) continue;
    RoleGradients total[kRoles], some[kRoles];
    gradients_of(expert, total);
    partial_of(part, some);
    for (int r = 0; r < kRoles; ++r) {
      const Role& role = problem.roles[r];
      const auto add = [](float* to, const float* from, int64_t size) {
        for (int64_t at = 0; at < size; ++at) to[at] += from[at];
      };
      add(total[r].a, some[r].a, role.ranks * role.in);
      add(total[r].b, some[r].b, role.ranks * role.out);
      add(total[r].gate, some[r].gate, role.ranks);
    }
  }
}

// ------------------------------------------------------------------------------------------- XLA

constexpr int kFactors = 8;  // index of the first role's matrices among the arguments
constexpr int kInputs = kFactors + 3 * kRoles;

template <typename T>
T* data_of(const ffi::AnyBuffer& buffer) {
  return buffer.element_count() == 0 ? nullptr : static_cast<T*>(buffer.untyped_data());
}

float* result(ffi::RemainingRets& results, size_t index) {
  return data_of<float>(**results.get<ffi::AnyBuffer>(index));
}

struct Options {
  float scale;
  bool is_gelu;
  double dropout;
  int64_t parts;
};

Problem read(ffi::RemainingArgs& args, const Options& options) {
  const auto buffer = [&](size_t index) { return *args.get<ffi::AnyBuffer>(index); };
  const auto floats = [&](size_t index) { return data_of<const float>(buffer(index)); };
  Problem problem;
  problem.tokens = buffer(0).dimensions()[0];
  problem.width = buffer(0).dimensions()[1];
  problem.choices = buffer(1).dimensions()[1];
  problem.experts = buffer(4).dimensions()[1];
  problem.hidden = buffer(4).dimensions()[2];
  problem.parts = options.parts;
  problem.x = floats(0);
  problem.expert = data_of<const int32_t>(buffer(1));
  problem.weight = floats(2);
  const int64_t layer = *data_of<const int32_t>(buffer(5));
  const int64_t matrix = problem.experts * problem.width * problem.hidden;
  problem.gate_up = floats(3) + layer * 2 * matrix;
  problem.down = floats(4) + layer * matrix;
  problem.scale = options.scale;
  problem.is_gelu = options.is_gelu;
  problem.dropout = {options.dropout > 0,
                     static_cast<uint32_t>(std::nearbyint(options.dropout * 4294967296.0)),
                     static_cast<float>(1.0 - options.dropout), data_of<const uint32_t>(buffer(6)),
                     data_of<const int32_t>(buffer(7))};
  for (int r = 0; r < kRoles; ++r) {
    const int at = kFactors + 3 * r;
    const auto a = buffer(at).dimensions(), b = buffer(at + 1).dimensions();
    problem.roles[r] = {floats(at), floats(at + 1), floats(at + 2), a[1], a[2], b[2]};
  }
  return problem;
}

ffi::Error run_forward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results,
                       float scale, bool is_gelu, double dropout, int64_t parts) {
  Problem problem = read(args, {scale, is_gelu, dropout, parts});
  forward(problem, pool, result(results, 0), result(results, 1), result(results, 2));
  return ffi::Error::Success();
}

ffi::Error run_backward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results,
                        float scale, bool is_gelu, double dropout, int64_t parts) {
  Problem problem = read(args, {scale, is_gelu, dropout, parts});
  const float* dy = data_of<const float>(*args.get<ffi::AnyBuffer>(kInputs));
  const float* kept = data_of<const float>(*args.get<ffi::AnyBuffer>(kInputs + 1));
  float* grads[kRoles][3];
  for (int at = 0; at < 3 * kRoles; ++at) grads[at / 3][at % 3] = result(results, 2 + at);
  const int last = 2 + 3 * kRoles;
  backward(problem, pool, dy, kept, result(results, 0), result(results, 1), grads,
           result(results, last), result(results, last + 1));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace drlora

#define DRLORA_BIND                \
  xla::ffi::Ffi::Bind()            \
      .Ctx<xla::ffi::ThreadPool>() \
      .RemainingArgs()             \
      .RemainingRets()             \
      .Attr<float>("scale")        \
      .Attr<bool>("is_gelu")       \
      .Attr<double>("dropout")     \
      .Attr<int64_t>("parts")

XLA_FFI_DEFINE_HANDLER_SYMBOL(DrloraExpertsForward, drlora::run_forward, DRLORA_BIND);
XLA_FFI_DEFINE_HANDLER_SYMBOL(DrloraExpertsBackward, drlora::run_backward, DRLORA_BIND);
