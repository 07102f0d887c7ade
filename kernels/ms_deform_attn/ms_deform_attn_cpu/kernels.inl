// The kernels. Each unit takes two steps: `locate` turns positions and scores into the four tokens around each sample
// and their weights, all samples at once, and then the rows of those tokens are added up (or added to).
//
// Included once per instruction set, inside its namespace, after vectors.inl.

constexpr int64_t kUnitsAhead = 4, kQueriesAhead = 8;  // how early positions and scores are asked for
constexpr int kNarrow = kLanes < 8 ? kLanes : 8;  // lanes that the channels of any head are a multiple of
constexpr int kCorners = 4;  // upper left, upper right, lower left, lower right

// What `locate` finds out about a unit's samples; arrays of problem.padded_samples.
struct Samples {
  float* weight[kCorners];
  int32_t* token[kCorners];  // within the image; the first is -1 where the sample is outside its map
  float scale;               // what all weights are still to be multiplied by: the softmax's denominator
  // For the backward pass: attention before the scale, the pixel at the upper left, and how far the sample is from it.
  float* attention;
  int32_t *left, *upper;
  float *right_share, *lower_share;
};

// The thread's own memory, cut into arrays.
struct Memory {
  float* next;

  float* floats(int64_t count) {
    float* start = next;
    next += (count + kMostLanes - 1) / kMostLanes * kMostLanes;
    return start;
  }
  int32_t* ints(int64_t count) { return reinterpret_cast<int32_t*>(floats(count)); }
};

// `count` numbers as float32, readable up to `padded`: those in memory where they are float32 and not the tensor's last
// ones, else a copy.
INLINE const float* as_floats(const void* data, Type type, int64_t start, int64_t count, int64_t padded, int64_t total,
                              float* copy) {
  if (type == Type::kFloat32 && start + padded <= total) return static_cast<const float*>(data) + start;
  with_type(type, [&](auto constant) {
    using Number = Element<decltype(constant)::value>;
    const char* first = static_cast<const char*>(data) + start * Number::kSize;
    if (start + padded <= total) {
      for (int64_t i = 0; i < padded; i += kLanes) {
        store_vector(copy + i, Number::template load<kLanes>(first + i * Number::kSize));
      }
    } else {
      alignas(64) char rest[kLanes * 4] = {};
      for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t numbers = count - i < kLanes ? count - i : kLanes;
        __builtin_memcpy(rest, first + i * Number::kSize, numbers * Number::kSize);
        store_vector(copy + i, Number::template load<kLanes>(rest));
      }
    }
  });
  return copy;
}

// Writes float32 numbers in another type; `source` is readable up to a multiple of kLanes.
INLINE void write_floats(const float* source, void* data, Type type, int64_t start, int64_t count) {
  with_type(type, [&](auto constant) {
    using Number = Element<decltype(constant)::value>;
    char* first = static_cast<char*>(data) + start * Number::kSize;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      Number::template store<kLanes>(first + i * Number::kSize, load_vector<Floats>(source + i));
    }
    if (i < count) {
      char rest[kLanes * Number::kSize];
      Number::template store<kLanes>(rest, load_vector<Floats>(source + i));
      copy_some<Number::kSize>(first + i * Number::kSize, rest, count - i);
    }
  });
}

// Whether the lanes from sample `first` on are samples of the problem.
INLINE Ints is_sample(const Problem& problem, int64_t first) {
  Ints lanes;
  for (int lane = 0; lane < kLanes; lane++) lanes[lane] = lane;
  return lanes < int32_t(problem.samples - first);
}

// The largest of the unit's scores.
INLINE float largest_score(const Problem& problem, const float* scores) {
  const Floats lowest = Floats{} - __builtin_inff();
  Floats largest = lowest;
  for (int64_t i = 0; i < problem.padded_samples; i += kLanes) {
    const Floats score = is_sample(problem, i) ? load_vector<Floats>(scores + i) : lowest;
    largest = score > largest ? score : largest;
  }
  return reduce<kLanes>(largest, [](auto a, auto b) { return a > b ? a : b; });
}

// What turns the positions of one query into pixels: pixel = position * scale + origin. Arrays of padded_samples.
struct Frame {
  float *origin_x, *origin_y, *scale_x, *scale_y;
};

// A frame with all that is the same for every query.
INLINE Frame first_frame(const Problem& problem, Memory& memory) {
  const int64_t count = problem.padded_samples;
  const Frame frame = {memory.floats(count), memory.floats(count), memory.floats(count), memory.floats(count)};
  for (int64_t i = 0; i < count; i++) {
    frame.origin_x[i] = frame.origin_y[i] = -0.5f;
    frame.scale_x[i] = problem.fused ? 1.0f : problem.table.width[i];
    frame.scale_y[i] = problem.fused ? 1.0f : problem.table.height[i];
  }
  return frame;
}

// Nothing is sampled in a box whose size is not finite; as a factor, that size would make a gradient of 0 NaN.
INLINE void set_scale(float* scale, float* origin, int64_t sample, float size) {
  const bool finite = size - size == 0.0f;
  scale[sample] = finite ? size : 0.0f;
  if (!finite) origin[sample] = __builtin_nanf("");
}

INLINE void move_frame(const Problem& problem, int64_t query, Frame frame) {
  if (!problem.fused) return;
  const SampleTable& table = problem.table;
  const int64_t count = problem.padded_samples, numbers = problem.reference_numbers;
  const float* references = problem.reference_points + query / problem.queries * problem.reference_image_stride +
                            query % problem.queries * problem.reference_levels * numbers;
  for (int64_t i = 0; i < count; i++) {
    const float* centre = references + (problem.reference_levels == 1 ? 0 : table.level[i] * numbers);
    frame.origin_x[i] = centre[0] * table.width[i] - 0.5f;
    frame.origin_y[i] = centre[1] * table.height[i] - 0.5f;
  }
  if (numbers == 2) return;
  for (int64_t i = 0; i < count; i++) {
    const float* size = references + (problem.reference_levels == 1 ? 0 : table.level[i] * numbers) + 2;
    set_scale(frame.scale_x, frame.origin_x, i, size[0] * table.width[i] * problem.box_step);
    set_scale(frame.scale_y, frame.origin_y, i, size[1] * table.height[i] * problem.box_step);
  }
}

template <bool kBackward>
INLINE void locate(const Problem& problem, Frame frame, const float* positions, const float* scores,
                   Samples& samples) {
  const SampleTable& table = problem.table;
  constexpr auto each_lane = std::make_integer_sequence<int, kLanes>();
  const float largest = problem.fused ? largest_score(problem, scores) : 0.0f;
  Floats sums = {};
  for (int64_t i = 0; i < problem.padded_samples; i += kLanes) {
    const Floats low = load_vector<Floats>(positions + 2 * i);
    const Floats high = load_vector<Floats>(positions + 2 * i + kLanes);
    Floats x = even_elements(low, high, each_lane) * load_vector<Floats>(frame.scale_x + i) +
               load_vector<Floats>(frame.origin_x + i);
    Floats y = odd_elements(low, high, each_lane) * load_vector<Floats>(frame.scale_y + i) +
               load_vector<Floats>(frame.origin_y + i);

    // NaN fails every comparison and is outside.
    const Ints inside = (x > -1.0f) & (x < load_vector<Floats>(table.width + i)) & (y > -1.0f) &
                        (y < load_vector<Floats>(table.height + i)) & is_sample(problem, i);
    x = inside ? x : Floats{};
    y = inside ? y : Floats{};

    Ints left = __builtin_convertvector(x, Ints);
    Ints upper = __builtin_convertvector(y, Ints);
    left += __builtin_convertvector(left, Floats) > x;  // rounded towards zero, now down: true is -1
    upper += __builtin_convertvector(upper, Floats) > y;
    const Floats right_share = x - __builtin_convertvector(left, Floats);
    const Floats lower_share = y - __builtin_convertvector(upper, Floats);

    const Ints last_x = load_vector<Ints>(table.last_x + i);
    const Ints last_y = load_vector<Ints>(table.last_y + i);
    Floats attention = load_vector<Floats>(scores + i);
    if (problem.fused) {
      attention = is_sample(problem, i) ? exp_of_negative(attention - largest) : Floats{};
      sums += attention;
    }
    const Floats weight = inside ? attention : Floats{};
    const Floats upper_weight = upper >= 0 ? weight * (1.0f - lower_share) : Floats{};
    const Floats lower_weight = upper < last_y ? weight * lower_share : Floats{};
    const Floats left_weight = left >= 0 ? 1.0f - right_share : Floats{};
    const Floats right_weight = left < last_x ? right_share : Floats{};
    store_vector(samples.weight[0] + i, upper_weight * left_weight);
    store_vector(samples.weight[1] + i, upper_weight * right_weight);
    store_vector(samples.weight[2] + i, lower_weight * left_weight);
    store_vector(samples.weight[3] + i, lower_weight * right_weight);

    // A corner outside has no weight; it reads its neighbour inside.
    const Ints row = load_vector<Ints>(table.row + i);
    const Ints first = load_vector<Ints>(table.first_token + i);
    const Ints upper_row = first + (upper >= 0 ? upper : Ints{}) * row;
    const Ints lower_row = first + (upper < last_y ? upper + 1 : last_y) * row;
    const Ints left_column = left >= 0 ? left : Ints{};
    const Ints right_column = left < last_x ? left + 1 : last_x;
    store_vector(samples.token[0] + i, inside ? upper_row + left_column : Ints{} - 1);
    store_vector(samples.token[1] + i, upper_row + right_column);
    store_vector(samples.token[2] + i, lower_row + left_column);
    store_vector(samples.token[3] + i, lower_row + right_column);

    if constexpr (kBackward) {
      store_vector(samples.attention + i, attention);
      store_vector(samples.left + i, left);
      store_vector(samples.upper + i, upper);
      store_vector(samples.right_share + i, right_share);
      store_vector(samples.lower_share + i, lower_share);
    }
  }
  samples.scale = problem.fused ? 1.0f / reduce<kLanes>(sums, [](auto a, auto b) { return a + b; }) : 1.0f;
}

// Asks for numbers that will be read soon. Inlined, or the compiler takes it for a function without effect.
INLINE void prefetch(const void* data, Type type, int64_t start, int64_t count) {
  const int64_t size = type == Type::kFloat32 ? 4 : 2;
  const char* first = static_cast<const char*>(data) + start * size;
  for (int64_t i = 0; i < count * size; i += 64) __builtin_prefetch(first + i);
  __builtin_prefetch(first + count * size - 1);
}

class Locator {
 public:
  Locator(const Problem& problem, Memory& memory) : problem_(problem) {
    const int64_t count = problem.padded_samples;
    for (int corner = 0; corner < kCorners; corner++) {
      samples_.weight[corner] = memory.floats(count);
      samples_.token[corner] = memory.ints(count);
    }
    samples_.attention = memory.floats(count);
    samples_.left = memory.ints(count);
    samples_.upper = memory.ints(count);
    samples_.right_share = memory.floats(count);
    samples_.lower_share = memory.floats(count);
    positions_ = memory.floats(2 * count);
    scores_ = memory.floats(count);
  }

  // The samples of one unit, in the frame of its query; valid until the next call. `later` is a unit to come.
  template <bool kBackward>
  INLINE const Samples& samples_of(int64_t unit, Frame frame, int64_t later) {
    const int64_t count = problem_.samples, padded = problem_.padded_samples;
    prefetch(problem_.positions, problem_.position_type, later * count * 2, padded * 2);
    prefetch(problem_.scores, problem_.score_type, later * count, padded);
    const int64_t total = problem_.images * problem_.queries * problem_.heads * count;
    const float* positions = as_floats(problem_.positions, problem_.position_type, unit * count * 2, count * 2,
                                       padded * 2, total * 2, positions_);
    const float* scores = as_floats(problem_.scores, problem_.score_type, unit * count, count, padded, total, scores_);
    locate<kBackward>(problem_, frame, positions, scores, samples_);
    return samples_;
  }

 private:
  const Problem& problem_;
  Samples samples_;
  float *positions_, *scores_;
};

// One head of one image of the value.
struct Rows {
  const char* first;
  int64_t stride;  // bytes

  template <Type type>
  static INLINE Rows of(const Problem& problem, int64_t image, int64_t head) {
    constexpr int64_t size = Element<type>::kSize;
    return {static_cast<const char*>(problem.value) +
                (image * problem.value_image_stride + head * problem.value_head_stride) * size,
            problem.value_token_stride * size};
  }
};

// Writes kVectors vectors of the unit's output.
template <Type type, int N, int kVectors>
INLINE void add_up(const Problem& problem, const Samples& samples, Rows rows, char* output) {
  using Number = Element<type>;
  FloatsOf<N> upper[kVectors] = {}, lower[kVectors] = {};
  for (int64_t sample = 0; sample < problem.samples; sample++) {
    if (samples.token[0][sample] < 0) continue;
    const char* row[kCorners];
    float weight[kCorners];
    for (int corner = 0; corner < kCorners; corner++) {
      row[corner] = rows.first + samples.token[corner][sample] * rows.stride;
      weight[corner] = samples.weight[corner][sample];
    }
    for (int i = 0; i < kVectors; i++) {
      const int64_t start = i * N * Number::kSize;
      upper[i] += weight[0] * Number::template load<N>(row[0] + start);
      upper[i] += weight[1] * Number::template load<N>(row[1] + start);
      lower[i] += weight[2] * Number::template load<N>(row[2] + start);
      lower[i] += weight[3] * Number::template load<N>(row[3] + start);
    }
  }
  for (int i = 0; i < kVectors; i++) Number::template store<N>(output + i * N * Number::kSize, (upper[i] + lower[i]) * samples.scale);
}

// Calls function(std::integral_constant<int, lanes>) with the most lanes that the head's channels are a multiple of.
template <typename Function>
INLINE void with_lanes(int64_t head_dim, Function function) {
  if constexpr (kLanes == 16) {
    if (head_dim % 16 != 0) return function(std::integral_constant<int, 8>());
  }
  function(std::integral_constant<int, kLanes>());
}

template <Type type, int N>
void forward_typed(const Problem& problem, int64_t first_query, int64_t last_query, Memory memory) {
  constexpr int64_t size = Element<type>::kSize;
  const Frame frame = first_frame(problem, memory);
  Locator locator(problem, memory);
  for (int64_t query = first_query; query < last_query; query++) {
    move_frame(problem, query, frame);
    for (int64_t head = 0; head < problem.heads; head++) {
      const int64_t unit = query * problem.heads + head;
      const Samples& samples = locator.samples_of<false>(unit, frame, unit + kUnitsAhead);
      Rows rows = Rows::of<type>(problem, query / problem.queries, head);
      char* output = static_cast<char*>(problem.output) + unit * problem.head_dim * size;
      int64_t left = problem.head_dim / N;
      const auto add_up_next = [&](auto vectors) INLINE_LAMBDA {
        add_up<type, N, vectors>(problem, samples, rows, output);
        rows.first += vectors * N * size;
        output += vectors * N * size;
        left -= vectors;
      };
      while (left >= 4) add_up_next(std::integral_constant<int, 4>());
      if (left >= 2) add_up_next(std::integral_constant<int, 2>());
      if (left >= 1) add_up_next(std::integral_constant<int, 1>());
    }
  }
}

void forward(const Problem& problem, int64_t first_query, int64_t last_query, float* memory) {
  with_type(problem.value_type, [&](auto type) {
    with_lanes(problem.head_dim, [&](auto lanes) {
      forward_typed<decltype(type)::value, decltype(lanes)::value>(problem, first_query, last_query, Memory{memory});
    });
  });
}

// For kLanes / kCorners samples: adds to the gradients of the rows around each, and gives the product of each row with
// the gradient of the output, as [corner][sample]. kVectors is head_dim / N if known, else 0.
template <int N, int kVectors>
INLINE Floats spread(const Problem& problem, const Samples& samples, int64_t first_sample, const float* value,
                     const float* grad_output, float* grad_value) {
  constexpr int count = kLanes / kCorners;
  const int64_t vectors = kVectors > 0 ? kVectors : problem.head_dim / N;
  Floats products[kLanes];
  for (int i = 0; i < count; i++) {
    const int64_t sample = first_sample + i;
    const bool outside = samples.token[0][sample] < 0;
    for (int corner = 0; corner < kCorners; corner++) {
      FloatsOf<N> product = {};
      if (!outside) {
        const int64_t start = samples.token[corner][sample] * problem.head_dim;
        const float weight = samples.weight[corner][sample];
        for (int64_t j = 0; j < vectors; j++) {
          const FloatsOf<N> grad = load_vector<FloatsOf<N>>(grad_output + j * N);
          float* grad_row = grad_value + start + j * N;
          product += grad * load_vector<FloatsOf<N>>(value + start + j * N);
          store_vector(grad_row, load_vector<FloatsOf<N>>(grad_row) + weight * grad);
        }
      }
      Floats& wide = products[corner * count + i];
      wide = Floats{};
      __builtin_memcpy(&wide, &product, sizeof(product));
    }
  }
  return sum_of_each(products);
}

// Gradients of positions and, before the softmax, scores of kLanes samples. `products`: of the row at each corner with
// the gradient of the output.
INLINE void differentiate(const Problem& problem, Frame frame, const Samples& samples, int64_t first,
                          const Floats* products, float* grad_positions, float* grad_scores) {
  const SampleTable& table = problem.table;
  const Ints left = load_vector<Ints>(samples.left + first);
  const Ints upper = load_vector<Ints>(samples.upper + first);
  const Ints has_left = left >= 0, has_right = left < load_vector<Ints>(table.last_x + first);
  const Ints has_upper = upper >= 0, has_lower = upper < load_vector<Ints>(table.last_y + first);
  // What is outside the map is 0.
  const Floats upper_left = has_upper & has_left ? products[0] : Floats{};
  const Floats upper_right = has_upper & has_right ? products[1] : Floats{};
  const Floats lower_left = has_lower & has_left ? products[2] : Floats{};
  const Floats lower_right = has_lower & has_right ? products[3] : Floats{};

  const Floats right_share = load_vector<Floats>(samples.right_share + first);
  const Floats lower_share = load_vector<Floats>(samples.lower_share + first);
  const Floats attention = load_vector<Floats>(samples.attention + first);
  const Floats upper_slope = upper_right - upper_left, lower_slope = lower_right - lower_left;
  const Floats upper_value = upper_left + right_share * upper_slope;
  const Floats lower_value = lower_left + right_share * lower_slope;
  const Floats grad_x = attention * (upper_slope + lower_share * (lower_slope - upper_slope));
  const Floats grad_y = attention * (lower_value - upper_value);
  store_vector(grad_scores + first, upper_value + lower_share * (lower_value - upper_value));
  interleave(grad_x * load_vector<Floats>(frame.scale_x + first), grad_y * load_vector<Floats>(frame.scale_y + first),
             grad_positions + 2 * first, std::make_integer_sequence<int, kLanes>());
}

// From the gradients of a softmax's results, before their scale, to those of its logits.
INLINE void differentiate_softmax(const Problem& problem, const Samples& samples, float* grad_scores) {
  Floats sums = {};
  for (int64_t i = 0; i < problem.padded_samples; i += kLanes) {
    const Floats part = load_vector<Floats>(samples.attention + i) * load_vector<Floats>(grad_scores + i);
    sums += is_sample(problem, i) ? part : Floats{};
  }
  const float mean = samples.scale * reduce<kLanes>(sums, [](auto a, auto b) { return a + b; });
  for (int64_t i = 0; i < problem.padded_samples; i += kLanes) {
    const Floats attention = load_vector<Floats>(samples.attention + i);
    store_vector(grad_scores + i, attention * (load_vector<Floats>(grad_scores + i) - mean));
  }
}

template <int N, int kVectors>
void backward_sized(const Problem& problem, int64_t image, int64_t head, int64_t first_query, int64_t last_query,
                    const float* value, float* grad_value, Memory memory) {
  const Frame frame = first_frame(problem, memory);
  Locator locator(problem, memory);
  float* grad_positions = memory.floats(2 * problem.padded_samples);
  float* grad_scores = memory.floats(problem.padded_samples);
  float* grad_output = memory.floats(problem.head_dim);

  for (int64_t query = image * problem.queries + first_query; query < image * problem.queries + last_query; query++) {
    const int64_t unit = query * problem.heads + head;
    move_frame(problem, query, frame);
    const int64_t later = unit + kQueriesAhead * problem.heads;
    const Samples& samples = locator.samples_of<true>(unit, frame, later);
    prefetch(problem.grad_output, problem.value_type, later * problem.head_dim, problem.head_dim);
    with_type(problem.value_type, [&](auto constant) INLINE_LAMBDA {
      using Number = Element<decltype(constant)::value>;
      const char* grad = static_cast<const char*>(problem.grad_output) + unit * problem.head_dim * Number::kSize;
      for (int64_t i = 0; i < problem.head_dim; i += N) {
        store_vector(grad_output + i, Number::template load<N>(grad + i * Number::kSize) * samples.scale);
      }
    });
    for (int64_t i = 0; i < problem.padded_samples; i += kLanes) {
      Floats products[kCorners] = {};
      for (int part = 0; part < kCorners; part++) {
        const int64_t first = i + part * (kLanes / kCorners);
        if (first >= problem.samples) break;
        products[part] = spread<N, kVectors>(problem, samples, first, value, grad_output, grad_value);
      }
      transpose_blocks(products, std::make_integer_sequence<int, kLanes>());
      differentiate(problem, frame, samples, i, products, grad_positions, grad_scores);
    }
    if (problem.fused) differentiate_softmax(problem, samples, grad_scores);
    write_floats(grad_positions, problem.grad_positions, problem.position_type, unit * problem.samples * 2,
                 problem.samples * 2);
    write_floats(grad_scores, problem.grad_scores, problem.score_type, unit * problem.samples, problem.samples);
  }
}

void backward(const Problem& problem, int64_t image, int64_t head, int64_t first_query, int64_t last_query,
              const float* value, float* grad_value, float* memory) {
  with_lanes(problem.head_dim, [&](auto lanes) {
    constexpr int N = decltype(lanes)::value;
    // 32 channels a head is what models have.
    const auto sized = problem.head_dim == 32 ? backward_sized<N, 32 / N> : backward_sized<N, 0>;
    sized(problem, image, head, first_query, last_query, value, grad_value, Memory{memory});
  });
}

void load_value(const Problem& problem, int64_t image, int64_t head, float* rows) {
  with_type(problem.value_type, [&](auto constant) {
    using Number = Element<decltype(constant)::value>;
    const Rows source = Rows::of<decltype(constant)::value>(problem, image, head);
    for (int64_t token = 0; token < problem.tokens; token++) {
      const char* row = source.first + token * source.stride;
      for (int64_t i = 0; i < problem.head_dim; i += kNarrow) {
        store_vector(rows + token * problem.head_dim + i, Number::template load<kNarrow>(row + i * Number::kSize));
      }
    }
  });
}

void store_grad_value(const Problem& problem, int64_t image, int64_t head, const float* const* buffers, int64_t count,
                      int64_t first_token, int64_t last_token) {
  with_type(problem.value_type, [&](auto constant) {
    using Number = Element<decltype(constant)::value>;
    for (int64_t token = first_token; token < last_token; token++) {
      char* row = static_cast<char*>(problem.grad_value) +
                  ((image * problem.tokens + token) * problem.heads + head) * problem.head_dim * Number::kSize;
      for (int64_t i = 0; i < problem.head_dim; i += kNarrow) {
        const int64_t start = token * problem.head_dim + i;
        FloatsOf<kNarrow> sum = load_vector<FloatsOf<kNarrow>>(buffers[0] + start);
        for (int64_t j = 1; j < count; j++) sum += load_vector<FloatsOf<kNarrow>>(buffers[j] + start);
        Number::template store<kNarrow>(row + i * Number::kSize, sum);
      }
    }
  });
}
