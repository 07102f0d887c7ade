// Vectors of floats in the compiler's own vector types, and loads and stores of the three value types.
//
// Included once per instruction set, inside its namespace; nothing here may call a function template of the standard
// library, since the linker would be free to keep the copy made for the newest instruction set.

template <int N>
struct VectorOf {
  typedef float Floats __attribute__((vector_size(N * 4)));
  typedef int32_t Ints __attribute__((vector_size(N * 4)));
  typedef uint32_t Bits __attribute__((vector_size(N * 4)));
  typedef uint16_t Halves __attribute__((vector_size(N * 2)));
};
template <int N>
using FloatsOf = typename VectorOf<N>::Floats;

using Floats = FloatsOf<kLanes>;
using Ints = VectorOf<kLanes>::Ints;

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

template <typename Vector>
INLINE Vector load_vector(const void* pointer) {
  Vector vector;
  __builtin_memcpy(&vector, pointer, sizeof(Vector));
  return vector;
}

template <typename Vector>
INLINE void store_vector(void* pointer, Vector vector) {
  __builtin_memcpy(pointer, &vector, sizeof(Vector));
}

// Copies fewer than 2 * kStep elements of kSize bytes.
template <int64_t kSize, int kStep = kLanes / 2>
INLINE void copy_some(char* target, const char* source, int64_t count) {
  if (count >= kStep) {
    __builtin_memcpy(target, source, kStep * kSize);
    target += kStep * kSize;
    source += kStep * kSize;
    count -= kStep;
  }
  if constexpr (kStep > 1) copy_some<kSize, kStep / 2>(target, source, count);
}

// Each as the lower half of a 32-bit number; compilers take detours over __builtin_convertvector.
template <int N>
INLINE typename VectorOf<N>::Bits widen_bits(typename VectorOf<N>::Halves halves) {
  using Bits = typename VectorOf<N>::Bits;
#if defined(MS_DEFORM_ATTN_AVX2)
  if constexpr (N == 8) return (Bits)_mm256_cvtepu16_epi32((__m128i)halves);
#endif
#if defined(MS_DEFORM_ATTN_AVX512)
  if constexpr (N == 16) return (Bits)_mm512_cvtepu16_epi32((__m256i)halves);
#endif
  return __builtin_convertvector(halves, Bits);
}

template <int N>
INLINE FloatsOf<N> widen_half(typename VectorOf<N>::Halves half) {
#if defined(MS_DEFORM_ATTN_AVX2)
  if constexpr (N == 8) return (FloatsOf<N>)_mm256_cvtph_ps((__m128i)half);
#endif
#if defined(MS_DEFORM_ATTN_AVX512)
  if constexpr (N == 16) return (FloatsOf<N>)_mm512_cvtph_ps((__m256i)half);
#endif
  using Bits = typename VectorOf<N>::Bits;
  const Bits bits = widen_bits<N>(half);
  const Bits sign = (bits & 0x8000u) << 16;
  // Moved into a float's fields the number is too small by 2^112; the product is exact, for subnormal numbers too.
  const FloatsOf<N> magnitude = (FloatsOf<N>)((bits & 0x7fffu) << 13) * 0x1p112f;
  const Bits special = (Bits)((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;  // infinity and NaN
  return (FloatsOf<N>)((Bits)magnitude | special | sign);
}

template <int N>
INLINE typename VectorOf<N>::Halves narrow_to_half(FloatsOf<N> floats) {
#if defined(MS_DEFORM_ATTN_AVX2)
  using Halves = typename VectorOf<N>::Halves;
  if constexpr (N == 8) return (Halves)_mm256_cvtps_ph((__m256)floats, _MM_FROUND_TO_NEAREST_INT);
#endif
#if defined(MS_DEFORM_ATTN_AVX512)
  if constexpr (N == 16) return (Halves)_mm512_cvtps_ph((__m512)floats, _MM_FROUND_TO_NEAREST_INT);
#endif
  using Bits = typename VectorOf<N>::Bits;
  const Bits bits = (Bits)floats;
  const Bits magnitude = bits & 0x7fffffffu;
  // Rounds to nearest even by adding below the last bit that stays.
  const Bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns a number below 2^-14 with the smallest subnormal half, 2^-24.
  const Bits subnormal = (Bits)((FloatsOf<N>)magnitude + 0.5f) - 0x3f000000u;
  Bits half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? half * 0u + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? half * 0u + 0x7e00u : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), typename VectorOf<N>::Halves);
}

template <int N>
INLINE typename VectorOf<N>::Halves narrow_to_bfloat16(FloatsOf<N> floats) {
  using Bits = typename VectorOf<N>::Bits;
  const Bits bits = (Bits)floats;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits not_a_number = (bits >> 16) | 0x40u;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? not_a_number : rounded,
                                 typename VectorOf<N>::Halves);
}

template <Type type>
struct Element;

template <>
struct Element<Type::kFloat32> {
  static constexpr int64_t kSize = 4;
  template <int N>
  static INLINE FloatsOf<N> load(const void* pointer) {
    return load_vector<FloatsOf<N>>(pointer);
  }
  template <int N>
  static INLINE void store(void* pointer, FloatsOf<N> floats) {
    store_vector(pointer, floats);
  }
};

template <>
struct Element<Type::kFloat16> {
  static constexpr int64_t kSize = 2;
  template <int N>
  static INLINE FloatsOf<N> load(const void* pointer) {
    return widen_half<N>(load_vector<typename VectorOf<N>::Halves>(pointer));
  }
  template <int N>
  static INLINE void store(void* pointer, FloatsOf<N> floats) {
    store_vector(pointer, narrow_to_half<N>(floats));
  }
};

template <>
struct Element<Type::kBfloat16> {
  static constexpr int64_t kSize = 2;
  template <int N>
  static INLINE FloatsOf<N> load(const void* pointer) {
    return (FloatsOf<N>)(widen_bits<N>(load_vector<typename VectorOf<N>::Halves>(pointer)) << 16);
  }
  template <int N>
  static INLINE void store(void* pointer, FloatsOf<N> floats) {
    store_vector(pointer, narrow_to_bfloat16<N>(floats));
  }
};

// Calls function(std::integral_constant<Type, type>).
template <typename Function>
INLINE void with_type(Type type, Function function) {
  switch (type) {
    case Type::kFloat32:
      return function(std::integral_constant<Type, Type::kFloat32>());
    case Type::kFloat16:
      return function(std::integral_constant<Type, Type::kFloat16>());
    case Type::kBfloat16:
      return function(std::integral_constant<Type, Type::kBfloat16>());
  }
}

template <int... I>
INLINE Floats even_elements(Floats low, Floats high, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(low, high, (2 * I)...);
}

template <int... I>
INLINE Floats odd_elements(Floats low, Floats high, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(low, high, (2 * I + 1)...);
}

// Writes x[0], y[0], x[1], y[1] ...
template <int... I>
INLINE void interleave(Floats x, Floats y, float* pairs, std::integer_sequence<int, I...>) {
  store_vector(pairs, __builtin_shufflevector(x, y, (I / 2 + I % 2 * kLanes)...));
  store_vector(pairs + kLanes, __builtin_shufflevector(x, y, (kLanes / 2 + I / 2 + I % 2 * kLanes)...));
}

// Two vectors of groups of `Group` numbers -> one of groups of half that size, with the same sums.
template <int Group, int... I>
INLINE Floats halve_groups(Floats low, Floats high, std::integer_sequence<int, I...>) {
  constexpr int half = Group / 2;
  return __builtin_shufflevector(low, high, (I / half * Group + I % half)...) +
         __builtin_shufflevector(low, high, (I / half * Group + I % half + half)...);
}

// The sum of each of kLanes vectors.
template <int Group = kLanes>
INLINE Floats sum_of_each(const Floats* vectors) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  if constexpr (Group == 2) {
    return halve_groups<2>(vectors[0], vectors[1], lanes);
  } else {
    // After the smaller groups, each of the two holds the groups of half of the vectors.
    Floats halves[Group / 2];
    for (int i = 0; i < Group / 2; i++) halves[i] = halve_groups<Group>(vectors[2 * i], vectors[2 * i + 1], lanes);
    return sum_of_each<Group / 2>(halves);
  }
}

// Takes each vector as four blocks: block j of vector i becomes block i of vector j.
template <int... I>
INLINE void transpose_blocks(Floats* vectors, std::integer_sequence<int, I...>) {
  constexpr int block = kLanes / 4;
  Floats pairs[4];  // blocks 0 and 1 of vectors 0 and 1, then blocks 2 and 3 of them; the same of vectors 2 and 3
  for (int i = 0; i < 2; i++) {
    const Floats &even = vectors[2 * i], &odd = vectors[2 * i + 1];
    pairs[2 * i] = __builtin_shufflevector(even, odd, (I / block / 2 * block + I / block % 2 * kLanes + I % block)...);
    pairs[2 * i + 1] =
        __builtin_shufflevector(even, odd, ((I / block / 2 + 2) * block + I / block % 2 * kLanes + I % block)...);
  }
  constexpr int half = kLanes / 2;
  for (int i = 0; i < 2; i++) {
    vectors[2 * i] = __builtin_shufflevector(pairs[i], pairs[i + 2], (I / half * kLanes + I % half)...);
    vectors[2 * i + 1] = __builtin_shufflevector(pairs[i], pairs[i + 2], (I / half * kLanes + half + I % half)...);
  }
}

// All lanes reduced to one number by `combine`, which takes vectors of any length.
template <int N, typename Combine>
INLINE float reduce(FloatsOf<N> vector, Combine combine) {
  if constexpr (N == 1) {
    return vector[0];
  } else {
    FloatsOf<N / 2> halves[2];
    __builtin_memcpy(halves, &vector, sizeof(vector));
    return reduce<N / 2>(combine(halves[0], halves[1]), combine);
  }
}

// e^x for x <= 0, to about one unit in the last place; below -87 it is 0, and what is not a number stays so.
INLINE Floats exp_of_negative(Floats x) {
  const Floats exponent = x * 1.44269504f + 0x1.8p23f;  // rounds x / ln 2 to an integer in the lowest bits
  const Floats n = exponent - 0x1.8p23f;
  const Floats r = (x - n * 0x1.62e4p-1f) - n * -0x1.7f7d1cp-20f;  // ln 2 in two parts, the first times n exact
  // Taylor's series: |r| <= ln 2 / 2
  const Floats series =
      1.0f + r * (1.0f + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720))))));
  const Floats scaled = (Floats)((Ints)series + ((Ints)exponent << 23));
  const Floats result = x < -87.0f ? Floats{} : scaled;
  return x == x ? result : x;
}
