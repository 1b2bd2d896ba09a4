#include "core/embedding_bag.h"

#include "core/bag_gradient.h"
#include "sanitize.h"

namespace llmkern::sanitize {
namespace {

constexpr int64_t V = 11;

struct Case {
  DType t;
  bool wide, weighted, mean;
  int64_t D, padding_idx;
  std::vector<int64_t> starts;
  int64_t N;  // as many as the last bag's end, or more
};

// Sums and means, and all their gradients.
void sum_case(const Case& c, const cpu::Bags& bags) {
  const int64_t D = c.D, B = bags.B, N = bags.N;
  const Array weight = random(c.t, V * D), samples = random(c.t, N), dout = random(c.t, B * D);
  const Array out(c.t, B * D), dsamples(c.t, N), dweight(c.t, V * D);
  const cpu::BagTable table{weight.data(), c.weighted ? samples.data() : nullptr, c.t, V, D};
  Doubles sums(B * D), dots(N), gradient(V * D);
  for (int64_t b = 0; b < B; ++b) {
    double count = 0;
    for (int64_t i = c.starts[b]; i < c.starts[b + 1]; ++i) count += bags.indices[i] != c.padding_idx;
    const double share = c.mean && count > 0 ? 1 / count : 1;
    for (int64_t i = c.starts[b]; i < c.starts[b + 1]; ++i)
      for (int64_t d = 0, row = bags.indices[i]; d < D && row != c.padding_idx; ++d) {
        const double factor = share * (c.weighted ? samples[i] : 1);
        sums[b * D + d] += factor * weight[row * D + d];
        dots[i] += share * dout[b * D + d] * weight[row * D + d];
        gradient[row * D + d] += factor * dout[b * D + d];
      }
  }
  const double terms = static_cast<double>(N + D);
  cpu::embedding_bag_forward(table, bags, c.mean, out.data());
  near("out", out, sums, terms);
  cpu::embedding_bag_samples_backward(table, bags, c.mean, dout.data(), dsamples.data());
  near("dsamples", dsamples, dots, terms);
  const cpu::BagGradient terms_of(table, bags, c.mean, dout.data(), nullptr);
  cpu::table_gradient(terms_of.terms(), terms_of.order(), V, c.padding_idx, false, dweight.data());
  near("dweight", dweight, gradient, terms);
}

void max_case(const Case& c, const cpu::Bags& bags) {
  const int64_t D = c.D, B = bags.B;
  const Array weight = random(c.t, V * D), dout = random(c.t, B * D), out(c.t, B * D), dweight(c.t, V * D);
  const cpu::BagTable table{weight.data(), nullptr, c.t, V, D};
  const std::unique_ptr<int32_t[]> largest(new int32_t[B * D]);
  cpu::embedding_bag_max_forward(table, bags, out.data(), largest.get());
  Doubles gradient(V * D);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t d = 0; d < D; ++d) {
      int64_t first = -1;
      for (int64_t i = c.starts[b]; i < c.starts[b + 1]; ++i)
        if (bags.indices[i] != c.padding_idx &&
            (first < 0 || weight[bags.indices[i] * D + d] > weight[bags.indices[first] * D + d]))
          first = i;
      if (largest[b * D + d] != first) fail("not the first of the largest");
      near("out", out[b * D + d], first < 0 ? 0 : weight[bags.indices[first] * D + d], c.t);
      if (first >= 0) gradient[bags.indices[first] * D + d] += dout[b * D + d];
    }
  const cpu::BagGradient terms(table, bags, false, dout.data(), largest.get());
  cpu::table_gradient(terms.terms(), terms.order(), V, c.padding_idx, false, dweight.data());
  near("dweight", dweight, gradient, static_cast<double>(B));
}

void bag_case(const Case& c) {
  where = std::string("embedding_bag ") + name_of(c.t) + (c.wide ? " int64 " : " int32 ") + std::to_string(c.D) +
          " of " + std::to_string(c.N);
  const std::unique_ptr<char[]> bytes(new char[c.N * (c.wide ? 8 : 4)]);
  const auto set = [&](int64_t i, int64_t row) {
    c.wide ? void(reinterpret_cast<int64_t*>(bytes.get())[i] = row)
           : void(reinterpret_cast<int32_t*>(bytes.get())[i] = static_cast<int32_t>(row));
  };
  for (int64_t i = 0; i < c.N; ++i) set(i, (i * i + 3) % V);
  const int64_t B = static_cast<int64_t>(c.starts.size()) - 1;
  const cpu::Bags bags{{bytes.get(), c.wide}, c.N, B, c.starts.data(), c.padding_idx};
  sum_case(c, bags);
  if (!c.mean && !c.weighted) max_case(c, bags);
  if (c.starts.back() == 0) return;
  for (int64_t bad : {int64_t{-1}, V}) {
    set(c.starts.back() - 1, bad);
    const Array weight = random(c.t, V * c.D), dout = random(c.t, B * c.D), out(c.t, B * c.D), dsamples(c.t, c.N);
    const std::unique_ptr<int32_t[]> largest(new int32_t[B * c.D]);
    const cpu::BagTable table{weight.data(), nullptr, c.t, V, c.D};
    throws<std::out_of_range>("sum", [&] { cpu::embedding_bag_forward(table, bags, c.mean, out.data()); });
    throws<std::out_of_range>("max", [&] { cpu::embedding_bag_max_forward(table, bags, out.data(), largest.get()); });
    throws<std::out_of_range>(
        "dot", [&] { cpu::embedding_bag_samples_backward(table, bags, c.mean, dout.data(), dsamples.data()); });
    throws<std::out_of_range>("dweight", [&] { cpu::BagGradient(table, bags, c.mean, dout.data(), nullptr); });
  }
}

void check_starts() {
  where = "bag_starts";
  int64_t starts[4];
  const auto of = [&](std::vector<int32_t> offsets, int64_t N, bool last) {
    cpu::bag_starts({offsets.data(), false}, N, static_cast<int64_t>(offsets.size()) - last, last, starts);
  };
  of({0, 2, 2}, 5, false);
  if (starts[1] != 2 || starts[3] != 5) fail("wrong");
  of({0, 2, 4}, 5, true);
  if (starts[2] != 4) fail("wrong");
  of({}, 5, false);
  cpu::bag_starts({nullptr, true}, 6, 3, false, starts);
  if (starts[1] != 2 || starts[3] != 6) fail("wrong");
  throws<std::runtime_error>("first", [&] { of({1, 2}, 5, false); });
  throws<std::runtime_error>("last", [&] { of({0, 6}, 5, false); });
  throws<std::invalid_argument>("decreasing", [&] { of({0, 4, 3}, 5, false); });
  throws<std::invalid_argument>("decreasing", [&] { of({0, 4, 3}, 5, true); });
}

}  // namespace

LLMKERN_CHECK(embedding_bag) {
  check_starts();
  for (DType t : kDTypes)
    for (bool wide : {false, true})
      for (bool weighted : {false, true})
        for (bool mean : {false, true})
          for (int64_t D : {1, 7, 67, 147}) {
            bag_case({t, wide, weighted, mean, D, 3, {0, 0, 3, 4, 4, 77}, 77});
            bag_case({t, wide, weighted, mean, D, -1, {0, 1500, 1501}, 1510});
            bag_case({t, wide, weighted, mean, D, -1, {0, 0}, 0});
          }
}

}  // namespace llmkern::sanitize
