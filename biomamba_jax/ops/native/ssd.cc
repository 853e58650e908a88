// Mamba-2's recurrence on the CPU, forward and backward; decays and weights of the steps are given.
//
// A thread handles one head of a row at a time. Vectors are channels. A few states of one vector stay in registers while
// a chunk of tokens passes, then the next ones. The forward pass keeps the state at the start of every chunk; the
// backward pass recomputes a chunk's states from there, and they lie in the L1 cache until it has used them.
#include <vector>

#include "vectors.h"

namespace native {
namespace {

constexpr int STATES = 8;  // states that stay in registers

struct Arrays {
  int64_t chunk, rows, length, heads, channels, groups, states;
  const float *x, *weight, *decay, *B, *C, *D;
  const int32_t* segment_ids;

  Arrays(int64_t chunk, F32& x, F32& weight, F32& decay, F32& B, F32& C, F32& D, S32& segment_ids)
      : chunk(chunk), rows(x.dimensions()[0]), length(x.dimensions()[1]), heads(x.dimensions()[2]),
        channels(x.dimensions()[3]), groups(B.dimensions()[2]), states(B.dimensions()[3]), x(x.typed_data()),
        weight(weight.typed_data()), decay(decay.typed_data()), B(B.typed_data()), C(C.typed_data()),
        D(D.typed_data()), segment_ids(optional(segment_ids)) {}

  int64_t vectors() const { return cdiv(channels, LANES); }
  int64_t blocks() const { return cdiv(states, STATES); }
  int count(int64_t vector) const { return std::min<int64_t>(LANES, channels - vector * LANES); }
  int64_t step(int64_t row, int64_t t, int64_t head) const { return (row * length + t) * heads + head; }
  int64_t at(int64_t row, int64_t t, int64_t head, int64_t vector) const {
    return step(row, t, head) * channels + vector * LANES;
  }
  int64_t projection(int64_t row, int64_t t, int64_t head) const {
    return ((row * length + t) * groups + head / (heads / groups)) * states;
  }
  int64_t state(int64_t row, int64_t head, int64_t vector) const {
    return ((row * heads + head) * channels + vector * LANES) * states;
  }
};

// The states of a head, [vectors blocks STATES], zero beyond N.
struct States : std::vector<V> {
  explicit States(const Arrays& in) : std::vector<V>(in.vectors() * in.blocks() * STATES) {}

  V* of(const Arrays& in, int64_t vector, int64_t block = 0) {
    return data() + (vector * in.blocks() + block) * STATES;
  }
  void load(const Arrays& in, int64_t row, int64_t head, const float* from) {
    for (int64_t v = 0; v < in.vectors(); ++v)
      load_columns(from + in.state(row, head, v), in.states, in.count(v), 1, of(in, v));
  }
  void store(const Arrays& in, int64_t row, int64_t head, float* to) {
    for (int64_t v = 0; v < in.vectors(); ++v)
      store_columns(of(in, v), in.states, in.count(v), to + in.state(row, head, v));
  }
  // Kept states are [rows chunks heads] of these, each in the memory of [channels N] padded to multiples of 16 and 8.
  static int64_t kept(const Arrays& in, int64_t row, int64_t chunk, int64_t head) {
    const int64_t size = cdiv(in.channels, 16) * 16 * in.blocks() * STATES;
    return ((row * cdiv(in.length, in.chunk) + chunk) * in.heads + head) * size;
  }
};

// A chunk of tokens of a head.
struct Chunk {
  int64_t length, steps = 0;
  std::vector<V> x;               // [vectors chunk]
  std::vector<float> B, C;        // [blocks chunk STATES], zero beyond N
  std::vector<float> weight, decay;
  struct Run {
    int64_t first, end;
    bool fresh;  // begins a segment, with states of zero
  };
  std::vector<Run> runs;          // of tokens of one segment

  explicit Chunk(const Arrays& in)
      : length(in.chunk), x(in.vectors() * length), B(in.blocks() * length * STATES), C(B.size()), weight(length),
        decay(length) {}

  void load(const Arrays& in, int64_t row, int64_t head, int64_t begin) {
    steps = std::min(length, in.length - begin);
    runs.clear();
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t step = in.step(row, begin + t, head), id = row * in.length + begin + t;
      weight[t] = in.weight[step];
      decay[t] = in.decay[step];
      const bool fresh = in.segment_ids && begin + t && in.segment_ids[id] != in.segment_ids[id - 1];
      if (fresh || !t) runs.push_back({t, t, fresh});
      ++runs.back().end;
      const int64_t from = in.projection(row, begin + t, head);
      for (int64_t block = 0; block < in.blocks(); ++block) {
        const int64_t n = block * STATES, to = (block * length + t) * STATES;
        const int64_t count = std::min<int64_t>(STATES, in.states - n);
        std::copy_n(in.B + from + n, count, &B[to]);
        std::copy_n(in.C + from + n, count, &C[to]);
      }
    }
    load_channels(in, row, head, begin, in.x, x);
  }

  void load_channels(const Arrays& in, int64_t row, int64_t head, int64_t begin, const float* from,
                     std::vector<V>& to) {
    for (int64_t v = 0; v < in.vectors(); ++v)
      for (int64_t t = 0; t < steps; ++t)
        to[v * length + t] = native::load(from + in.at(row, begin + t, head, v), in.count(v));
  }
};

// Steps through a chunk with some states of a vector of channels. `out` [chunk] gets what they add to the outputs, if
// wanted, and `after` [chunk STATES] the states.
template <bool OUT, bool AFTER>
void advance(const Chunk& c, int64_t vector, int64_t block, V* states, V* out, V* after) {
  const V* x = &c.x[vector * c.length];
  const float *B = &c.B[block * c.length * STATES], *C = &c.C[block * c.length * STATES];
  for (const Chunk::Run& run : c.runs) {
    V S[STATES];
    for (int n = 0; n < STATES; ++n) S[n] = run.fresh ? V{} : states[n];
    for (int64_t t = run.first; t < run.end; ++t) {
      const V u = c.weight[t] * x[t];
      const float decay = c.decay[t];
      V y[2] = {};  // two sums: additions to one would wait for each other
      for (int n = 0; n < STATES; ++n) {
        S[n] = decay * S[n] + B[t * STATES + n] * u;
        if (OUT) y[n % 2] += C[t * STATES + n] * S[n];
        if (AFTER) after[t * STATES + n] = S[n];
      }
      if (OUT) out[t] += y[0] + y[1];
    }
    for (int n = 0; n < STATES; ++n) states[n] = S[n];
  }
}

void forward(const Arrays& in, int64_t row, int64_t head, const float* initial, float* y, float* last, float* starts) {
  States states(in);
  Chunk chunk(in);
  std::vector<V> out(chunk.x.size());
  states.load(in, row, head, initial);
  for (int64_t begin = 0; begin < in.length; begin += in.chunk) {
    chunk.load(in, row, head, begin);
    if (starts) {
      const int64_t at = States::kept(in, row, begin / in.chunk, head);
      std::memcpy(starts + at, states.data(), states.size() * sizeof(V));
    }
    std::fill(out.begin(), out.end(), V{});
    for (int64_t block = 0; block < in.blocks(); ++block)
      for (int64_t v = 0; v < in.vectors(); ++v)
        advance<true, false>(chunk, v, block, states.of(in, v, block), &out[v * in.chunk], nullptr);
    for (int64_t v = 0; v < in.vectors(); ++v)
      for (int64_t t = 0; t < chunk.steps; ++t) {
        const int64_t i = v * in.chunk + t;
        store(out[i] + in.D[head] * chunk.x[i], y + in.at(row, begin + t, head, v), in.count(v));
      }
  }
  states.store(in, row, head, last);
}

// What the backward pass writes; `B` and `C` are sums over `share` heads of a group, [rows heads/share L N], and `D` is
// of each row, [rows heads].
struct Gradients {
  int64_t share;
  float *x, *weight, *decay, *B, *C, *D, *initial;
};

struct Scratch {
  std::vector<V> dy, du;           // [vectors chunk]
  std::vector<V> after, dB, dC;    // [chunk STATES]; the sums are over vectors
  std::vector<V> d_weight, d_decay;  // [chunk]
  explicit Scratch(const Arrays& in)
      : dy(in.vectors() * in.chunk), du(dy.size()), after(in.chunk * STATES), dB(after.size()), dC(after.size()),
        d_weight(in.chunk), d_decay(in.chunk) {}
};

// The transpose of `advance`: `carried` is the gradient by the states after the chunk, then by those before it.
void retreat(const Chunk& c, int64_t vector, int64_t block, const V* start, V* carried, Scratch& s) {
  const V *x = &c.x[vector * c.length], *dy = &s.dy[vector * c.length];
  const float *B = &c.B[block * c.length * STATES], *C = &c.C[block * c.length * STATES];
  V* du = &s.du[vector * c.length];
  for (auto run = c.runs.rbegin(); run != c.runs.rend(); ++run) {
    const V passed = s.d_decay[run->first];
    V dS[STATES];
    for (int n = 0; n < STATES; ++n) dS[n] = carried[n];
    for (int64_t t = run->end - 1; t >= run->first; --t) {
      const V *after = &s.after[t * STATES], *before = t ? after - STATES : start, u = c.weight[t] * x[t], d = dy[t];
      V *dB = &s.dB[t * STATES], *dC = &s.dC[t * STATES], d_u[2] = {}, d_decay[2] = {};
      const float decay = c.decay[t];
      for (int n = 0; n < STATES; ++n) {
        dS[n] += C[t * STATES + n] * d;
        dC[n] += d * after[n];
        dB[n] += dS[n] * u;
        d_u[n % 2] += B[t * STATES + n] * dS[n];
        d_decay[n % 2] += dS[n] * before[n];
        dS[n] = decay * dS[n];
      }
      du[t] += d_u[0] + d_u[1];
      s.d_decay[t] += d_decay[0] + d_decay[1];
    }
    if (run->fresh) s.d_decay[run->first] = passed;  // its decay had no effect
    for (int n = 0; n < STATES; ++n) carried[n] = run->fresh ? V{} : dS[n];
  }
}

void backward(const Arrays& in, int64_t row, int64_t head, const float* starts, const float* dy, const float* d_final,
              const Gradients& g) {
  States carried(in), states(in);
  Chunk chunk(in);
  Scratch s(in);
  V dD{};
  carried.load(in, row, head, d_final);
  for (int64_t begin = (cdiv(in.length, in.chunk) - 1) * in.chunk; begin >= 0; begin -= in.chunk) {
    chunk.load(in, row, head, begin);
    chunk.load_channels(in, row, head, begin, dy, s.dy);
    const int64_t kept = States::kept(in, row, begin / in.chunk, head);
    std::memcpy(states.data(), starts + kept, states.size() * sizeof(V));
    for (auto* sums : {&s.du, &s.d_weight, &s.d_decay}) std::fill(sums->begin(), sums->end(), V{});
    for (int64_t block = 0; block < in.blocks(); ++block) {
      for (auto* sums : {&s.dB, &s.dC}) std::fill(sums->begin(), sums->end(), V{});
      for (int64_t v = 0; v < in.vectors(); ++v) {
        V start[STATES];
        std::copy_n(states.of(in, v, block), STATES, start);
        advance<false, true>(chunk, v, block, states.of(in, v, block), nullptr, s.after.data());
        retreat(chunk, v, block, start, carried.of(in, v, block), s);
      }
      const int64_t end = std::min<int64_t>(STATES, in.states - block * STATES);
      for (int64_t t = 0; t < chunk.steps; ++t) {
        const int64_t sums = (row * in.heads + head) / g.share;
        const int64_t at = (sums * in.length + begin + t) * in.states + block * STATES;
        float dB[STATES], dC[STATES];
        sum8(&s.dB[t * STATES], dB);
        sum8(&s.dC[t * STATES], dC);
        for (int64_t n = 0; n < end; ++n) {
          g.B[at + n] = dB[n] + (head % g.share ? g.B[at + n] : 0.f);
          g.C[at + n] = dC[n] + (head % g.share ? g.C[at + n] : 0.f);
        }
      }
    }
    for (int64_t v = 0; v < in.vectors(); ++v)
      for (int64_t t = 0; t < chunk.steps; ++t) {
        const V x = chunk.x[v * in.chunk + t], d = s.dy[v * in.chunk + t], du = s.du[v * in.chunk + t];
        store(chunk.weight[t] * du + in.D[head] * d, g.x + in.at(row, begin + t, head, v), in.count(v));
        s.d_weight[t] += du * x;
        dD += d * x;
      }
    for (int64_t t = 0; t < chunk.steps; ++t) {
      g.weight[in.step(row, begin + t, head)] = sum(s.d_weight[t]);
      g.decay[in.step(row, begin + t, head)] = sum(s.d_decay[t]);
    }
  }
  g.D[row * in.heads + head] = sum(dD);
  carried.store(in, row, head, g.initial);
}

ffi::Error run_forward(ffi::ThreadPool pool, int64_t chunk, F32 x, F32 weight, F32 decay, F32 B, F32 C, F32 D,
                       S32 segment_ids, F32 initial, Out y, Out last, Out starts) {
  const Arrays in(chunk, x, weight, decay, B, C, D, segment_ids);
  parallel(pool, in.rows * in.heads, [&](int64_t i) {
    forward(in, i / in.heads, i % in.heads, initial.typed_data(), y->typed_data(), last->typed_data(),
            optional(*starts));
  });
  return ffi::Error::Success();
}

ffi::Error run_backward(ffi::ThreadPool pool, int64_t chunk, int64_t share, F32 x, F32 weight, F32 decay, F32 B, F32 C,
                        F32 D, S32 segment_ids, F32 starts, F32 dy, F32 d_final, Out dx, Out d_weight, Out d_decay,
                        Out dB, Out dC, Out dD, Out d_initial) {
  const Arrays in(chunk, x, weight, decay, B, C, D, segment_ids);
  const Gradients g{share,
                    dx->typed_data(), d_weight->typed_data(), d_decay->typed_data(),   dB->typed_data(),
                    dC->typed_data(), dD->typed_data(),       d_initial->typed_data()};
  parallel(pool, in.rows * in.heads / share, [&](int64_t i) {
    for (int64_t head = i * share; head < (i + 1) * share; ++head)
      backward(in, head / in.heads, head % in.heads, starts.typed_data(), dy.typed_data(), d_final.typed_data(), g);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace native

using native::F32, native::S32;

#define SHARED_INPUTS Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<S32>()
#define THREE_RESULTS Ret<F32>().Ret<F32>().Ret<F32>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(ssd_forward, native::run_forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<int64_t>("chunk")
                                  .SHARED_INPUTS.Arg<F32>()
                                  .THREE_RESULTS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(ssd_backward, native::run_backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<int64_t>("chunk")
                                  .Attr<int64_t>("share")
                                  .SHARED_INPUTS.Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .THREE_RESULTS.THREE_RESULTS.Ret<F32>());
