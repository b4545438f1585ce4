// Activations and their slopes on vectors: ReLU, GELU (Hendrycks and Gimpel 2016), its tanh form, SiLU.
//
//   gelu       x P(x),          P(x) = (1 + erf(x / sqrt 2)) / 2
//   gelu_tanh  x sigmoid(t),    t = 2 sqrt(2 / pi) (x + 0.044715 x^3)
//   silu       x sigmoid(x)

INLINE Vec magnitude(Vec x) { return (Vec)((BitVec)x & 0x7fffffffu); }

// P(x), the share of a normal distribution below x, to half a unit in the last place of 1.
// P(-a) = 2^(-1 - a s(a)), with s fitted on [0, 6.5] to 3e-9 of P and growing beyond: 0 in the end, and NaN for NaN.
INLINE Vec normal_below(Vec x) {
  const Vec a = magnitude(x);
  Vec s = broadcast(2.52685606e-8f);
  for (const float coefficient : {-7.82799816e-7f, 1.03011153e-5f, -7.32982153e-5f, 2.70620483e-4f, 1.6396014e-5f,
                                  -6.96550822e-3f, 5.2453503e-2f, 4.59216893e-1f, 1.15110457f})
    s = fused(s, a, broadcast(coefficient));
  const Vec below = exp2(fused(-a, s, broadcast(-1.0f)));
  return x > 0.0f ? 1.0f - below : below;
}

// The exponential's argument is never positive: nothing overflows, and small results keep their digits.
struct Sigmoid {
  Vec on, off;  // of x and of -x

  INLINE explicit Sigmoid(Vec x) {
    const Vec small = exp2(magnitude(x) * -1.44269504f);
    const Vec most = 1.0f / (1.0f + small), least = small * most;
    on = x < 0.0f ? least : most;
    off = x < 0.0f ? most : least;
  }
};

struct None {
  INLINE static Vec value(Vec x) { return x; }
  INLINE static Vec slope(Vec) { return broadcast(1.0f); }
};

struct Relu {
  INLINE static Vec value(Vec x) { return x < 0.0f ? Vec{} : x; }  // a NaN stays
  INLINE static Vec slope(Vec x) { return x > 0.0f ? broadcast(1.0f) : Vec{}; }
};

struct Gelu {
  INLINE static Vec value(Vec x) { return x * normal_below(x); }
  INLINE static Vec slope(Vec x) { return fused(x * 0.398942280f, exp2(x * x * -0.721347520f), normal_below(x)); }
};

struct GeluTanh {
  static constexpr float kTwice = 1.59576912f,
                         kCubic = 0.044715f;  // 2 sqrt(2 / pi)

  INLINE static Vec value(Vec x) { return x * Sigmoid(argument(x, x * x)).on; }
  INLINE static Vec slope(Vec x) {
    // Past 32 the slope is 0 or 1 to the last bit, and an infinite square times 0 would be NaN.
    const Vec square = x * x > 1024.0f ? broadcast(1024.0f) : x * x;
    const Sigmoid sigmoid(argument(x, square));
    return fused(x * sigmoid.on * sigmoid.off, fused(broadcast(3.0f * kCubic * kTwice), square, broadcast(kTwice)),
                 sigmoid.on);
  }

 private:
  INLINE static Vec argument(Vec x, Vec square) {
    return x * kTwice * fused(broadcast(kCubic), square, broadcast(1.0f));
  }
};

struct Silu {
  INLINE static Vec value(Vec x) { return x * Sigmoid(x).on; }
  INLINE static Vec slope(Vec x) {
    const Sigmoid sigmoid(x);
    return sigmoid.on * fused(x, sigmoid.off, broadcast(1.0f));
  }
};

// f(the activation's type)
template <class F>
INLINE void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kNone:
      return f(None{});
    case Activation::kRelu:
      return f(Relu{});
    case Activation::kGelu:
      return f(Gelu{});
    case Activation::kGeluTanh:
      return f(GeluTanh{});
    case Activation::kSilu:
      return f(Silu{});
  }
}
