// The selective scan on the CPU, forward and backward, fused with its softplus, skip connection and gate.
//
// A thread handles a range of channels of one row. Vectors are channels, so the state of one vector, [N LANES], stays in
// the L1 cache while time passes. The forward pass keeps the state at the start of every chunk of tokens; the backward
// pass recomputes one chunk at a time from there, and its decays and states lie in the L2 cache until it has used them.
#include <vector>

#include "vectors.h"

namespace native {
namespace {

struct Arrays {
  int64_t chunk, range;  // tokens between two kept states; channels that a thread handles at a time
  int64_t rows, length, channels, states;
  const float *x, *dt, *A, *B, *C, *D, *z, *dt_bias;
  const int32_t* segment_ids;

  Arrays(int64_t chunk, int64_t range, F32& x, F32& dt, F32& A, F32& B, F32& C, F32& D, F32& z, F32& dt_bias, S32& segment_ids)
      : chunk(chunk), range(range), rows(x.dimensions()[0]), length(x.dimensions()[1]), channels(x.dimensions()[2]), states(A.dimensions()[1]),
        x(x.typed_data()), dt(dt.typed_data()), A(A.typed_data()), B(B.typed_data()), C(C.typed_data()),
        D(D.typed_data()), z(optional(z)), dt_bias(dt_bias.typed_data()), segment_ids(optional(segment_ids)) {}

  int64_t ranges() const { return cdiv(channels, range); }
  int64_t chunks() const { return cdiv(length, chunk); }
  int64_t at(int64_t row, int64_t t, int64_t channel) const { return (row * length + t) * channels + channel; }
  int64_t projection(int64_t row, int64_t t) const { return (row * length + t) * states; }
  int64_t start(int64_t row, int64_t chunk, int64_t channel) const {
    return (row * chunks() + chunk) * states * channels + channel;
  }
  bool new_segment(int64_t row, int64_t t) const {
    return segment_ids && t && segment_ids[row * length + t] != segment_ids[row * length + t - 1];
  }
};

// One vector of channels on its way through the chunks.
struct Channels {
  int64_t first;
  int count;
  V bias, D;
  std::vector<V> A, carry;  // [N]; A is A log2(e). `carry` is the state; backward, the loss's gradient by it
  std::vector<V> dA;        // [N], backward only
  V d_bias{}, dD{};

  Channels(const Arrays& in, int64_t row, int64_t first, int64_t end, const float* carried)
      : first(first), count(std::min<int64_t>(LANES, end - first)), bias(load(in.dt_bias + first, count)),
        D(load(in.D + first, count)), A(in.states), carry(in.states) {
    load_columns(in.A + first * in.states, in.states, count, LOG2_E, A.data());
    load_columns(carried + (row * in.channels + first) * in.states, in.states, count, 1, carry.data());
  }
};

std::vector<Channels> vectors_of(const Arrays& in, int64_t row, int64_t range, const float* carried) {
  std::vector<Channels> vectors;
  const int64_t end = std::min(in.channels, (range + 1) * in.range);
  for (int64_t first = range * in.range; first < end; first += LANES) vectors.emplace_back(in, row, first, end, carried);
  return vectors;
}

// A chunk of one vector: [chunk] arrays, computed before and after the recurrence, whose steps wait for each other.
struct Tokens {
  std::vector<V> delta, u, out;
  explicit Tokens(int64_t T) : delta(T), u(T), out(T) {}
};

void forward_chunk(const Arrays& in, int64_t row, int64_t chunk, Channels& c, Tokens& s, float* y, float* starts) {
  const int64_t N = in.states, begin = chunk * in.chunk, steps = std::min(in.chunk, in.length - begin);
  V *h = c.carry.data(), *A = c.A.data();
  if (starts)
    for (int64_t n = 0; n < N; ++n) store(h[n], starts + in.start(row, chunk, c.first) + n * in.channels, c.count);
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t at = in.at(row, begin + t, c.first);
    const V x = load(in.x + at, c.count);
    s.delta[t] = softplus(load(in.dt + at, c.count) + c.bias).value;
    s.u[t] = s.delta[t] * x;
    s.out[t] = c.D * x;
  }
  for (int64_t t = 0; t < steps; ++t) {
    if (in.new_segment(row, begin + t)) std::fill(h, h + N, V{});
    const float *B = in.B + in.projection(row, begin + t), *C = in.C + in.projection(row, begin + t);
    const V delta = s.delta[t], u = s.u[t];
    V out = s.out[t];
    for (int64_t n = 0; n < N; ++n) {
      h[n] = exp2(delta * A[n]) * h[n] + B[n] * u;
      out += C[n] * h[n];
    }
    s.out[t] = out;
  }
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t at = in.at(row, begin + t, c.first);
    const V z = in.z ? load(in.z + at, c.count) : V{};
    store(in.z ? s.out[t] * z * sigmoid(z) : s.out[t], y + at, c.count);
  }
}

void forward(const Arrays& in, int64_t row, int64_t range, const float* initial, float* y, float* last, float* starts) {
  std::vector<Channels> vectors = vectors_of(in, row, range, initial);
  Tokens tokens(in.chunk);
  for (int64_t chunk = 0; chunk < in.chunks(); ++chunk)
    for (Channels& c : vectors) forward_chunk(in, row, chunk, c, tokens, y, starts);
  for (const Channels& c : vectors)
    store_columns(c.carry.data(), in.states, c.count, last + (row * in.channels + c.first) * in.states);
}

// What the backward pass writes; `B` and `C` are sums over the channels of a range, [rows ranges L N].
struct Gradients {
  float *x, *dt, *A, *B, *C, *D, *z, *dt_bias, *initial;
};

struct Scratch {
  std::vector<V> decay, before;        // [chunk N]
  std::vector<V> dB, dC;               // [chunk N], sums over the vectors of a range
  // [chunk]: slope is the derivative of delta, dy the gradient before the gate, dz that of z divided by the output.
  std::vector<V> x, delta, slope, dy, dz;
  std::vector<V> h;                    // [N]
  Scratch(int64_t T, int64_t N)
      : decay(T * N), before(T * N), dB(T * N), dC(T * N), x(T), delta(T), slope(T), dy(T), dz(T), h(N) {}
};

void backward_chunk(const Arrays& in, int64_t row, int64_t chunk, Channels& c, const float* starts, const float* dy,
                    Scratch& s, const Gradients& g) {
  const int64_t N = in.states, begin = chunk * in.chunk, steps = std::min(in.chunk, in.length - begin);
  for (int64_t n = 0; n < N; ++n) s.h[n] = load(starts + in.start(row, chunk, c.first) + n * in.channels, c.count);
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t at = in.at(row, begin + t, c.first);
    const Softplus step = softplus(load(in.dt + at, c.count) + c.bias);
    s.x[t] = load(in.x + at, c.count);
    s.delta[t] = step.value;
    s.slope[t] = step.derivative;
    s.dy[t] = load(dy + at, c.count);
    if (in.z) {
      const V z = load(in.z + at, c.count), gate = sigmoid(z), d = s.dy[t] * gate;
      s.dz[t] = d * (1.f + z * (1.f - gate));
      s.dy[t] = d * z;
    }
  }
  for (int64_t t = 0; t < steps; ++t) {
    if (in.new_segment(row, begin + t)) std::fill(s.h.begin(), s.h.end(), V{});
    const float *B = in.B + in.projection(row, begin + t), *C = in.C + in.projection(row, begin + t);
    const V x = s.x[t], delta = s.delta[t], u = delta * x, d = s.dy[t];
    V out = c.D * x, *decay = &s.decay[t * N], *before = &s.before[t * N], *dC = &s.dC[t * N], *h = s.h.data();
    for (int64_t n = 0; n < N; ++n) {
      before[n] = h[n];
      decay[n] = exp2(delta * c.A[n]);
      h[n] = decay[n] * h[n] + B[n] * u;
      out += C[n] * h[n];
      dC[n] += d * h[n];
    }
    if (in.z) store(s.dz[t] * out, g.z + in.at(row, begin + t, c.first), c.count);
  }
  for (int64_t t = steps - 1; t >= 0; --t) {
    const int64_t at = in.at(row, begin + t, c.first);
    const float *B = in.B + in.projection(row, begin + t), *C = in.C + in.projection(row, begin + t);
    const V x = s.x[t], delta = s.delta[t], u = delta * x, d = s.dy[t];
    V *decay = &s.decay[t * N], *before = &s.before[t * N], *dB = &s.dB[t * N], du{}, d_decay{};
    for (int64_t n = 0; n < N; ++n) {
      const V dh = c.carry[n] + C[n] * d;
      dB[n] += dh * u;
      du += dh * B[n];
      c.carry[n] = decay[n] * dh;
      const V d_exponent = c.carry[n] * before[n];
      d_decay += d_exponent * c.A[n];
      c.dA[n] += d_exponent * delta;
    }
    if (in.new_segment(row, begin + t)) std::fill(c.carry.begin(), c.carry.end(), V{});
    // c.A is A log2(e), and u = delta x is in the input of the recurrence.
    const V d_dt = (d_decay * 0.693147181f + du * x) * s.slope[t];
    store(du * delta + c.D * d, g.x + at, c.count);
    store(d_dt, g.dt + at, c.count);
    c.d_bias += d_dt;
    c.dD += d * x;
  }
}

void backward(const Arrays& in, int64_t row, int64_t range, const float* starts, const float* dy, const float* d_final,
              const Gradients& g) {
  const int64_t N = in.states;
  std::vector<Channels> vectors = vectors_of(in, row, range, d_final);
  for (Channels& c : vectors) c.dA.resize(N);
  Scratch s(in.chunk, N);
  for (int64_t chunk = in.chunks() - 1; chunk >= 0; --chunk) {
    std::fill(s.dB.begin(), s.dB.end(), V{});
    std::fill(s.dC.begin(), s.dC.end(), V{});
    for (Channels& c : vectors) backward_chunk(in, row, chunk, c, starts, dy, s, g);
    const int64_t begin = chunk * in.chunk, steps = std::min(in.chunk, in.length - begin);
    const int64_t at = ((row * in.ranges() + range) * in.length + begin) * N;
    for (int64_t i = 0; i < steps * N; ++i) {
      g.B[at + i] = sum(s.dB[i]);
      g.C[at + i] = sum(s.dC[i]);
    }
  }
  for (const Channels& c : vectors) {
    const int64_t at = row * in.channels + c.first;
    store_columns(c.carry.data(), N, c.count, g.initial + at * N);
    store_columns(c.dA.data(), N, c.count, g.A + at * N);
    store(c.d_bias, g.dt_bias + at, c.count);
    store(c.dD, g.D + at, c.count);
  }
}

ffi::Error run_forward(ffi::ThreadPool pool, int64_t chunk, int64_t range, F32 x, F32 dt, F32 A, F32 B, F32 C, F32 D, F32 z, F32 dt_bias,
                       S32 segment_ids, F32 initial, Out y, Out last, Out starts) {
  const Arrays in(chunk, range, x, dt, A, B, C, D, z, dt_bias, segment_ids);
  parallel(pool, in.rows * in.ranges(), [&](int64_t i) {
    forward(in, i / in.ranges(), i % in.ranges(), initial.typed_data(), y->typed_data(), last->typed_data(),
            optional(*starts));
  });
  return ffi::Error::Success();
}

ffi::Error run_backward(ffi::ThreadPool pool, int64_t chunk, int64_t range, F32 x, F32 dt, F32 A, F32 B, F32 C, F32 D, F32 z, F32 dt_bias,
                        S32 segment_ids, F32 starts, F32 dy, F32 d_final, Out dx, Out d_dt, Out dA, Out dB, Out dC,
                        Out dD, Out dz, Out d_bias, Out d_initial) {
  const Arrays in(chunk, range, x, dt, A, B, C, D, z, dt_bias, segment_ids);
  const Gradients g{dx->typed_data(), d_dt->typed_data(), dA->typed_data(),     dB->typed_data(),       dC->typed_data(),
                    dD->typed_data(), optional(*dz),      d_bias->typed_data(), d_initial->typed_data()};
  parallel(pool, in.rows * in.ranges(), [&](int64_t i) {
    backward(in, i / in.ranges(), i % in.ranges(), starts.typed_data(), dy.typed_data(), d_final.typed_data(), g);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace native

using native::F32, native::S32;

#define SHARED_INPUTS                                                                                   \
  Ctx<xla::ffi::ThreadPool>().Attr<int64_t>("chunk").Attr<int64_t>("range").Arg<F32>().Arg<F32>()       \
      .Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<S32>()
#define THREE_RESULTS Ret<F32>().Ret<F32>().Ret<F32>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(selective_scan_forward, native::run_forward,
                              xla::ffi::Ffi::Bind().SHARED_INPUTS.Arg<F32>().THREE_RESULTS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    selective_scan_backward, native::run_backward,
    xla::ffi::Ffi::Bind().SHARED_INPUTS.Arg<F32>().Arg<F32>().Arg<F32>().THREE_RESULTS.THREE_RESULTS.THREE_RESULTS);
