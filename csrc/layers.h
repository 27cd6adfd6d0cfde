// Forward and backward of everything that is not a matrix product, on tiles [width][R], R = NV vectors of batch rows.

// Lane j of the result is the sum of the lanes of v[j]: a transpose that adds as it goes.
template <class T, int... I>
GK_INLINE V<T> reduce_lanes(V<T>* v, std::integer_sequence<int, I...>) {
  constexpr int L = kLanes<T>;
  for (int half = L / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) {
      const V<T> low = __builtin_shufflevector(v[i], v[i + half], ((I % 2) * L + I / 2)...);
      const V<T> high = __builtin_shufflevector(v[i], v[i + half], ((I % 2) * L + I / 2 + L / 2)...);
      v[i] = low + high;
    }
  return v[0];
}
template <class T>
GK_INLINE V<T> reduce_lanes(V<T>* v) {
  return reduce_lanes<T>(v, std::make_integer_sequence<int, kLanes<T>>{});
}

// y = f(x), flat over a tile. In backward x and g are the input and the gradient of the output.
template <class T>
struct Activation {
  Kind kind;
  T slope;  // LeakyReLU's slope, ELU's alpha

  template <class F>
  static GK_INLINE void each(long n, F f) {
    for (long i = 0; i < n; i += kLanes<T>) f(i);
  }

  void forward(const T* x, T* y, long n) const {
    switch (kind) {
      case Kind::Relu:
        return each(n, [=](long i) {
          const V<T> a = load(x + i);
          store(y + i, V<T>(a <= T(0) ? V<T>{} : a));  // NaN stays NaN
        });
      case Kind::LeakyRelu: {
        const T s = slope;
        return each(n, [=](long i) {
          const V<T> a = load(x + i);
          store(y + i, V<T>(a > T(0) ? a : a * s));
        });
      }
      case Kind::Silu:
        return each(n, [=](long i) {
          const V<T> a = load(x + i);
          store(y + i, V<T>(a * vsigmoid(a)));
        });
      case Kind::Gelu:
        return each(n, [=](long i) {
          const V<T> a = load(x + i);
          V<T> distribution, density;
          vnormal(a, distribution, density);
          store(y + i, V<T>(a * distribution));
        });
      case Kind::GeluTanh:
        return each(n, [=](long i) {
          const V<T> a = load(x + i);
          store(y + i, V<T>(T(0.5) * a * (T(1) + vtanh(gelu_tanh_argument(a)))));
        });
      case Kind::Tanh:
        return each(n, [=](long i) { store(y + i, vtanh(load(x + i))); });
      case Kind::Elu: {
        const T alpha = slope;
        return each(n, [=](long i) {
          const V<T> a = load(x + i);
          store(y + i, V<T>(a > T(0) ? a : alpha * vexpm1_negative(a)));
        });
      }
      case Kind::Softplus:
        return each(n, [=](long i) { store(y + i, vsoftplus(load(x + i))); });
      default:
        return each(n, [=](long i) { store(y + i, vsigmoid(load(x + i))); });
    }
  }

  // f'(x) · g, from the input or the output as `read_by_backward` in plan.cpp says; the other is not to be trusted.
  GK_INLINE V<T> derivative(V<T> x, V<T> y, V<T> g) const {
    switch (kind) {
      case Kind::Relu:
        return y <= T(0) ? V<T>{} : g;
      case Kind::LeakyRelu:
        return x > T(0) ? g : g * slope;
      case Kind::Silu: {
        const V<T> s = vsigmoid(x);
        return g * s * (T(1) + x * (T(1) - s));
      }
      case Kind::Gelu: {
        V<T> distribution, density;
        vnormal(x, distribution, density);
        return g * (distribution + x * density);
      }
      case Kind::GeluTanh: {
        const V<T> t = vtanh(gelu_tanh_argument(x));
        const V<T> inner = T(0.79788456080286535588) * (T(1) + T(3 * 0.044715) * x * x);
        return g * T(0.5) * (T(1) + t + x * (T(1) - t * t) * inner);
      }
      case Kind::Tanh:
        return g * (T(1) - y * y);
      case Kind::Elu:
        return x > T(0) ? g : g * slope * vexp(V<T>(x > T(0) ? V<T>{} : x));
      case Kind::Softplus:
        return x > T(20) ? g : g * vsigmoid(x);
      default:
        return g * y * (T(1) - y);
    }
  }

  // dx (+)= f'(x) · g
  template <class Op>
  void backward_as(Op op, const T* x, const T* y, const T* g, T* dx, long n, bool add) const {
    if (add)
      each(n, [&](long i) { store(dx + i, V<T>(load(dx + i) + op(load(x + i), load(y + i), load(g + i)))); });
    else
      each(n, [&](long i) { store(dx + i, op(load(x + i), load(y + i), load(g + i))); });
  }
  void backward(const T* x, const T* y, const T* g, T* dx, long n, bool add) const {
    // A constant kind in each branch lets the compiler drop the switch from the loop.
    switch (kind) {
#define GK_CASE(K)                                                                          \
  case K: {                                                                                 \
    const Activation<T> fixed{K, slope};                                                    \
    return backward_as([=](V<T> a, V<T> b, V<T> c) { return fixed.derivative(a, b, c); }, x, y, g, dx, n, add); \
  }
      GK_CASE(Kind::Relu)
      GK_CASE(Kind::LeakyRelu)
      GK_CASE(Kind::Silu)
      GK_CASE(Kind::Gelu)
      GK_CASE(Kind::GeluTanh)
      GK_CASE(Kind::Tanh)
      GK_CASE(Kind::Elu)
      GK_CASE(Kind::Softplus)
      default:
        GK_CASE(Kind::Sigmoid)
#undef GK_CASE
    }
  }

  static GK_INLINE V<T> gelu_tanh_argument(V<T> x) {
    return T(0.79788456080286535588) * (x + T(0.044715) * x * x * x);
  }
};

// LayerNorm (Ba et al., 2016) and RMSNorm (Zhang & Sennrich, 2019): per batch row, so per lane.
// keep: [2][R], mean and 1 / std of each row, for backward.
template <class T, int NV>
struct RowNorm {
  static constexpr int L = kLanes<T>, R = NV * L;

  // Rows from `valid` on are padding: whatever they hold, nothing infinite may come of it.
  static void forward(const T* x, int width, bool centred, T eps, const T* weight, const T* bias, int valid, T* y,
                      T* keep) {
    for (int v = 0; v < NV; ++v) {
      V<T> mean{}, square{};
      if (centred) {
        for (int c = 0; c < width; ++c) mean += load(x + c * R + v * L);
        mean /= T(width);
      }
      for (int c = 0; c < width; ++c) {
        const V<T> d = load(x + c * R + v * L) - mean;
        square += d * d;
      }
      V<T> inverse = T(1) / vsqrt<T>(square / T(width) + eps);
      for (int i = valid > v * L ? valid - v * L : 0; i < L; ++i) inverse[i] = T(0);
      store(keep + v * L, mean);
      store(keep + R + v * L, inverse);
      for (int c = 0; c < width; ++c) {
        V<T> out = (load(x + c * R + v * L) - mean) * inverse;
        if (weight) out = out * weight[c];
        if (bias) out = out + bias[c];
        store(y + c * R + v * L, out);
      }
    }
  }

  // dweight, dbias: [width][L] sums over vectors, kept by lane; null if not wanted.
  static void backward(const T* x, int width, bool centred, const T* weight, const T* keep, const T* g, T* dx, bool add,
                       T* dweight, T* dbias) {
    for (int v = 0; v < NV; ++v) {
      const V<T> mean = load(keep + v * L), inverse = load(keep + R + v * L);
      V<T> sum{}, dot{};
      for (int c = 0; c < width; ++c) {
        const V<T> hat = (load(x + c * R + v * L) - mean) * inverse;
        const V<T> gradient = load(g + c * R + v * L);
        if (dweight) store(dweight + c * L, V<T>(load(dweight + c * L) + gradient * hat));
        if (dbias) store(dbias + c * L, V<T>(load(dbias + c * L) + gradient));
        const V<T> scaled = weight ? gradient * weight[c] : gradient;
        sum += scaled;
        dot += scaled * hat;
      }
      sum = centred ? sum / T(width) : V<T>{};
      dot /= T(width);
      if (!dx) continue;
      for (int c = 0; c < width; ++c) {
        const V<T> hat = (load(x + c * R + v * L) - mean) * inverse;
        const V<T> gradient = load(g + c * R + v * L);
        const V<T> d = inverse * ((weight ? gradient * weight[c] : gradient) - sum - hat * dot);
        T* out = dx + c * R + v * L;
        store(out, add ? V<T>(load(out) + d) : d);
      }
    }
  }
};

// BatchNorm (Ioffe & Szegedy, 2015) on one tile; the statistics come from all tiles.
template <class T, int NV>
struct BatchNormTile {
  static constexpr int L = kLanes<T>, R = NV * L;

  // Per feature: mean and sum of squared deviations over the tile's valid rows, into out[0..width), out[stride..).
  static void moments(const T* x, int width, const T* mask, int valid, T* out, int stride) {
    for (int c0 = 0; c0 < width; c0 += L) {
      V<T> sums[L];
      for (int j = 0; j < L; ++j) {
        sums[j] = V<T>{};
        if (c0 + j < width)
          for (int v = 0; v < NV; ++v) sums[j] += load(x + (c0 + j) * R + v * L) * load(mask + v * L);
      }
      const V<T> mean = reduce_lanes<T>(sums) / T(valid);
      store(out + c0, mean);
      for (int j = 0; j < L; ++j) {
        sums[j] = V<T>{};
        if (c0 + j < width)
          for (int v = 0; v < NV; ++v) {
            const V<T> d = (load(x + (c0 + j) * R + v * L) - out[c0 + j]) * load(mask + v * L);
            sums[j] += d * d;
          }
      }
      store(out + stride + c0, reduce_lanes<T>(sums));
    }
  }

  // y = (x − mean) scale + shift
  static void forward(const T* x, int width, const T* mean, const T* scale, const T* shift, T* y) {
    for (int c = 0; c < width; ++c)
      for (int v = 0; v < NV; ++v) {
        const V<T> d = load(x + c * R + v * L) - mean[c];
        store(y + c * R + v * L, V<T>(d * scale[c] + (shift ? shift[c] : T(0))));
      }
  }

  // Per feature: sums of g and of g (x − mean), into out[0..width), out[stride..). Padding rows have g = 0.
  static void sums(const T* x, const T* g, int width, const T* mean, T* out, int stride) {
    for (int c0 = 0; c0 < width; c0 += L) {
      V<T> plain[L], dot[L];
      for (int j = 0; j < L; ++j) {
        plain[j] = dot[j] = V<T>{};
        if (c0 + j < width)
          for (int v = 0; v < NV; ++v) {
            const V<T> gradient = load(g + (c0 + j) * R + v * L);
            plain[j] += gradient;
            dot[j] += gradient * (load(x + (c0 + j) * R + v * L) - mean[c0 + j]);
          }
      }
      store(out + c0, reduce_lanes<T>(plain));
      store(out + stride + c0, reduce_lanes<T>(dot));
    }
  }

  // dx (+)= (scale g + offset + slope (x − mean)) mask, the coefficients per feature
  static void backward(const T* x, const T* g, int width, const T* mean, const T* scale, const T* offset,
                       const T* slope, const T* mask, T* dx, bool add) {
    for (int c = 0; c < width; ++c)
      for (int v = 0; v < NV; ++v) {
        const long i = c * R + v * L;
        const V<T> d = (load(g + i) * scale[c] + offset[c] + (load(x + i) - mean[c]) * slope[c]) * load(mask + v * L);
        store(dx + i, add ? V<T>(load(dx + i) + d) : d);
      }
  }
};
