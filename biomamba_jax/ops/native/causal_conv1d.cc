// The causal convolution on the CPU with its SiLU, forward and backward: one pass over time for a range of channels.
//
// Time is the outer loop, so that rows of the arrays stream through the cache; a channel's weights and sums stay there.
#include <vector>

#include "vectors.h"

namespace native {
namespace {

struct Convolution {
  bool silu;
  int64_t range, rows, length, channels, width;  // width K, of which K - 1 inputs are past
  const float *x, *weight, *bias, *initial;      // initial [B past C]
  const int32_t* segment_ids;

  Convolution(bool silu, int64_t range, F32& x, F32& weight, F32& bias, S32& segment_ids, F32& initial)
      : silu(silu), range(range), rows(x.dimensions()[0]), length(x.dimensions()[1]), channels(x.dimensions()[2]),
        width(weight.dimensions()[1]), x(x.typed_data()), weight(weight.typed_data()), bias(bias.typed_data()),
        initial(initial.typed_data()), segment_ids(optional(segment_ids)) {}

  int64_t past() const { return width - 1; }
  int64_t ranges() const { return cdiv(channels, range); }
  // Of inputs and their gradients, with the K - 1 inputs before the first token in front: e = t + K - 1.
  template <typename T>
  T* extended(T* before, T* tokens, int64_t row, int64_t e) const {
    return e < past() ? before + (row * past() + e) * channels : tokens + (row * length + e - past()) * channels;
  }
  // How many steps back token t may look, given how many the token before may: not across a change of segment.
  int64_t reach(int64_t row, int64_t t, int64_t before) const {
    if (!segment_ids || !t) return past();
    return segment_ids[row * length + t] == segment_ids[row * length + t - 1] ? std::min(past(), before + 1) : 0;
  }
};

// One vector of channels: weights [K], sums of their gradients [K], and gradients of the K newest inputs, oldest first.
struct Channels {
  int64_t first;
  int count;
  V bias, d_bias{};
  std::vector<V> weight, d_weight, pending;

  Channels(const Convolution& in, int64_t first, int64_t end)
      : first(first), count(std::min<int64_t>(LANES, end - first)), bias(load(in.bias + first, count)),
        weight(in.width), d_weight(in.width), pending(in.width) {
    load_columns(in.weight + first * in.width, in.width, count, 1, weight.data());
  }
};

std::vector<Channels> vectors_of(const Convolution& in, int64_t range) {
  std::vector<Channels> vectors;
  const int64_t end = std::min(in.channels, (range + 1) * in.range);
  for (int64_t first = range * in.range; first < end; first += LANES) vectors.emplace_back(in, first, end);
  return vectors;
}

inline V before_activation(const Convolution& in, const Channels& c, int64_t row, int64_t t, int64_t reach) {
  V sum = c.bias;
  for (int64_t k = in.past() - reach; k < in.width; ++k)
    sum += c.weight[k] * load(in.extended(in.initial, in.x, row, t + k) + c.first, c.count);
  return sum;
}

void forward(const Convolution& in, int64_t row, int64_t range, float* y) {
  const std::vector<Channels> vectors = vectors_of(in, range);
  int64_t reach = 0;
  for (int64_t t = 0; t < in.length; ++t) {
    reach = in.reach(row, t, reach);
    for (const Channels& c : vectors) {
      const V v = before_activation(in, c, row, t, reach);
      store(in.silu ? v * sigmoid(v) : v, y + (row * in.length + t) * in.channels + c.first, c.count);
    }
  }
}

struct Gradients {
  float *x, *weight, *bias, *initial;  // weight [B C K] and bias [B C] are sums over time
};

// `d_last` [B past C] is the gradient of the loss by the last K - 1 inputs as the final state.
void backward(const Convolution& in, int64_t row, int64_t range, const float* dy, const float* d_last,
              const Gradients& g) {
  std::vector<Channels> vectors = vectors_of(in, range);
  int64_t reach = 0;
  for (int64_t t = 0; t < in.length + in.past(); ++t) {
    if (t < in.length) reach = in.reach(row, t, reach);
    for (Channels& c : vectors) {
      if (t < in.length) {
        V d = load(dy + (row * in.length + t) * in.channels + c.first, c.count);
        if (in.silu) {
          const V v = before_activation(in, c, row, t, reach), s = sigmoid(v);
          d *= s * (1.f + v * (1.f - s));
        }
        c.d_bias += d;
        for (int64_t k = in.past() - reach; k < in.width; ++k) {
          c.d_weight[k] += d * load(in.extended(in.initial, in.x, row, t + k) + c.first, c.count);
          c.pending[k] += c.weight[k] * d;
        }
      } else if (reach >= in.past() - 1 - (t - in.length)) {  // the final state holds it, unless of another segment
        c.pending[0] += load(d_last + (row * in.past() + t - in.length) * in.channels + c.first, c.count);
      }
      store(c.pending[0], in.extended(g.initial, g.x, row, t) + c.first, c.count);
      for (int64_t k = 0; k < in.past(); ++k) c.pending[k] = c.pending[k + 1];
      c.pending[in.past()] = V{};
    }
  }
  for (const Channels& c : vectors) {
    store(c.d_bias, g.bias + row * in.channels + c.first, c.count);
    store_columns(c.d_weight.data(), in.width, c.count, g.weight + (row * in.channels + c.first) * in.width);
  }
}

ffi::Error run_forward(ffi::ThreadPool pool, bool silu, int64_t range, F32 x, F32 weight, F32 bias, S32 segment_ids,
                       F32 initial, Out y) {
  const Convolution in(silu, range, x, weight, bias, segment_ids, initial);
  parallel(pool, in.rows * in.ranges(),
           [&](int64_t i) { forward(in, i / in.ranges(), i % in.ranges(), y->typed_data()); });
  return ffi::Error::Success();
}

ffi::Error run_backward(ffi::ThreadPool pool, bool silu, int64_t range, F32 x, F32 weight, F32 bias, S32 segment_ids,
                        F32 initial, F32 dy, F32 d_last, Out dx, Out d_weight, Out d_bias, Out d_initial) {
  const Convolution in(silu, range, x, weight, bias, segment_ids, initial);
  const Gradients g{dx->typed_data(), d_weight->typed_data(), d_bias->typed_data(), d_initial->typed_data()};
  parallel(pool, in.rows * in.ranges(), [&](int64_t i) {
    backward(in, i / in.ranges(), i % in.ranges(), dy.typed_data(), d_last.typed_data(), g);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace native

using native::F32, native::S32;

#define SHARED_INPUTS                                                                                \
  Ctx<xla::ffi::ThreadPool>().Attr<bool>("silu").Attr<int64_t>("range").Arg<F32>().Arg<F32>()        \
      .Arg<F32>().Arg<S32>().Arg<F32>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(causal_conv1d_forward, native::run_forward,
                              xla::ffi::Ffi::Bind().SHARED_INPUTS.Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(causal_conv1d_backward, native::run_backward,
                              xla::ffi::Ffi::Bind().SHARED_INPUTS.Arg<F32>().Arg<F32>()
                                  .Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>());
