// The recurrent engine: every option in every dtype. In fp64 gradients are compared with differences of the outputs,
// which need no second engine; the other dtypes are compared with fp64.
#include <map>

#include "core/rnn_norm.h"
#include "sanitize.h"

namespace llmkern::sanitize {
namespace {

enum Shape { kDense, kBatchFirst, kPacked };

struct Case {
  cpu::RnnMode mode;
  int64_t T, B, I, H, P = 0, heads = 1;  // P = 0: not projected
  Shape shape = kDense;
  bool reverse = false, bias_ih = true, bias_hh = true, peephole = false;
  double clip = 0, zoneout_h = 0, zoneout_c = 0;
  bool draws = false, norms = false;
};

using Values = std::map<std::string, Doubles>;

class Layer {
 public:
  explicit Layer(const Case& c) : c_(c), out_(c.P ? c.P : c.H) {
    // Of an even number of packed sequences the last has no step.
    const int64_t first = c.B - (c.B % 2 == 0);
    for (int64_t t = 0; t < c.T; ++t) rows_.push_back(c.shape == kPacked ? std::max<int64_t>(1, first - t) : c.B);
    op_.mode = c.mode;
    op_.T = c.T;
    op_.B = c.B;
    op_.I = c.I;
    op_.H = c.H;
    op_.P = out_;
    op_.heads = c.heads;
    op_.reverse = c.reverse;
    op_.batch_first = c.shape == kBatchFirst;
    op_.batch_sizes = c.shape == kPacked ? rows_.data() : nullptr;
    op_.clip = c.clip;
    op_.zoneout_h = c.zoneout_h;
    op_.zoneout_c = c.zoneout_c;
    op_.draws = c.draws;
    op_.seed = 0x123456789abcd;
    n_ = cpu::tokens_of(op_);
    const int64_t G = cpu::gates_of(c.mode), rows = G * c.H, B = c.B, H = c.H;
    sizes_ = {{"x", n_ * c.I}, {"hx", B * out_}, {"weight_ih", rows * c.I}, {"weight_hh", rows * out_ / c.heads}};
    const int64_t C = cpu::cells_of(op_);
    if (C > 0) sizes_["cx"] = B * C;
    if (c.bias_ih) sizes_["bias_ih"] = rows;
    if (c.bias_hh) sizes_["bias_hh"] = rows;
    if (c.P) sizes_["weight_hr"] = c.P * H;
    if (c.peephole) sizes_["peephole"] = 3 * H;
    if (c.norms) sizes_["norms"] = cpu::norms_of(op_);
    cotangent_sizes_ = {{"y", n_ * out_}, {"hy", B * out_}};
    if (C > 0) {
      cotangent_sizes_["cy"] = B * C;
      cotangent_sizes_["cells"] = n_ * C;
    }
  }

  Values draw(const std::map<std::string, int64_t>& sizes) const {
    Values values;
    for (const auto& [name, n] : sizes)
      // Small weights: gradients that grow with every step would grow every rounding error as well.
      for (int64_t i = 0; i < n; ++i) values[name].push_back(uniform() * (name.starts_with("weight") ? 0.3 : 1));
    return values;
  }
  // A normaliser is positive, and a stabiliser about as large as the gates.
  Values inputs() const {
    Values values = draw(sizes_);
    if (c_.mode == cpu::RnnMode::slstm)
      for (int64_t b = 0; b < c_.B; ++b)
        for (int64_t u = 0; u < c_.H; ++u) values["cx"][(3 * b + 1) * c_.H + u] += 1.5;
    return values;
  }
  Values directions() const { return draw(sizes_); }
  Values cotangents() const { return draw(cotangent_sizes_); }

  // The outputs; with cotangents the gradients as well, named as the inputs.
  Values run(DType dtype, DType states, const Values& inputs, const Values* cotangents) {
    const DType wide = accum_of(dtype);
    std::map<std::string, Array> arrays;
    const auto type_of = [&](const std::string& name) {
      return name == "hx" || name == "cx" || name == "hy" || name == "cy" ? states : name == "cells" ? wide : dtype;
    };
    const auto place = [&](const std::string& key, const std::string& name, const Doubles& from) {
      const Array& a = arrays.emplace(key, Array(type_of(name), from.size())).first->second;
      for (size_t i = 0; i < from.size(); ++i) a.set(i, from[i]);
    };
    for (const auto& [name, from] : inputs) place(name, name, from);
    const auto pointer = [&](const std::string& key) -> void* {
      const auto found = arrays.find(key);
      return found == arrays.end() ? nullptr : found->second.data();
    };
    op_.dtype = dtype;
    op_.state_dtype = states;
    op_.x = pointer("x");
    op_.hx = pointer("hx");
    op_.cx = pointer("cx");
    op_.weight_ih = pointer("weight_ih");
    op_.weight_hh = pointer("weight_hh");
    op_.bias_ih = pointer("bias_ih");
    op_.bias_hh = pointer("bias_hh");
    op_.weight_hr = pointer("weight_hr");
    op_.peephole = pointer("peephole");
    op_.norms = pointer("norms");
    const auto outputs = [&](bool save) {
      for (const auto& [name, n] : cotangent_sizes_)
        if (save || name != "cells") arrays.emplace((save ? "saved " : "") + name, Array(type_of(name), n));
      if (save) arrays.emplace("gates", Array(dtype, n_ * cpu::saved_of(op_) * op_.H));
      if (save && op_.norms) arrays.emplace("normed", Array(wide, n_ * cpu::normed_of(op_)));
      const std::string prefix = save ? "saved " : "";
      cpu::rnn_forward(op_, {.y = pointer(prefix + "y"),
                             .hy = pointer(prefix + "hy"),
                             .cy = pointer(prefix + "cy"),
                             .gates = save && cpu::saved_of(op_) ? pointer("gates") : nullptr,
                             .cells = pointer(prefix + "cells"),
                             .normed = save ? pointer("normed") : nullptr});
    };
    outputs(false);
    outputs(true);
    for (const char* name : {"y", "hy"}) same(name, arrays.at(name), arrays.at(std::string("saved ") + name));
    Values results;
    for (const auto& [name, n] : cotangent_sizes_) results[name] = arrays.at("saved " + name).doubles();
    if (!cotangents) return results;
    for (const auto& [name, from] : *cotangents) place("d" + name, name, from);
    for (const auto& [name, n] : sizes_) arrays.emplace("grad " + name, Array(type_of(name), n));
    const auto grad = [&](const char* name) { return pointer(std::string("grad ") + name); };
    const cpu::RnnGradients out{grad("x"),         grad("hx"),      grad("cx"),      grad("weight_ih"),
                                grad("weight_hh"), grad("bias_ih"), grad("bias_hh"), grad("weight_hr"),
                                grad("peephole"),  grad("norms")};
    const auto backward = [&](const cpu::RnnGradients& gradients) {
      cpu::rnn_backward(op_,
                        {.dy = pointer("dy"),
                         .dcells = pointer("dcells"),
                         .dhy = pointer("dhy"),
                         .dcy = pointer("dcy"),
                         .y = pointer("saved y"),
                         .gates = cpu::saved_of(op_) ? pointer("gates") : nullptr,
                         .cells = pointer("saved cells"),
                         .normed = pointer("normed")},
                        gradients);
    };
    backward({});
    backward(out);
    for (const auto& [name, n] : sizes_) results[name] = arrays.at("grad " + name).doubles();
    return results;
  }

 private:
  const Case c_;
  const int64_t out_;
  std::vector<int64_t> rows_;
  int64_t n_ = 0;
  cpu::Rnn op_{};
  std::map<std::string, int64_t> sizes_, cotangent_sizes_;
};

double dot(const Values& a, const Values& b, const std::map<std::string, Doubles>& names) {
  double sum = 0;
  for (const auto& [name, unused] : names)
    for (size_t i = 0; i < a.at(name).size(); ++i) sum += a.at(name)[i] * b.at(name)[i];
  return sum;
}

void run_case(const Case& c) {
  where = "rnn mode " + std::to_string(static_cast<int>(c.mode)) + " T" + std::to_string(c.T) + " B" +
          std::to_string(c.B) + " I" + std::to_string(c.I) + " H" + std::to_string(c.H) + " P" + std::to_string(c.P) +
          " heads" + std::to_string(c.heads) + " shape" + std::to_string(c.shape) + (c.reverse ? " reverse" : "") +
          (c.peephole ? " peephole" : "") + (c.norms ? " norms" : "") + " clip" + text(c.clip) + " zoneout" +
          text(c.zoneout_h);
  Layer layer(c);
  const Values inputs = layer.inputs(), cotangents = layer.cotangents(), directions = layer.directions();
  const Values right = layer.run(DType::f64, DType::f64, inputs, &cotangents);
  Values ahead = inputs, behind = inputs;
  // Of 1e-8 to 1e-4 the one with the least error, 9e-8: rounding falls with the step, and over a longer one a relu or a
  // clip changes sides.
  const double step = 1e-6;
  for (const auto& [name, values] : directions)
    for (size_t i = 0; i < values.size(); ++i) {
      ahead[name][i] += step * values[i];
      behind[name][i] -= step * values[i];
    }
  const double rise = dot(layer.run(DType::f64, DType::f64, ahead, nullptr), cotangents, cotangents) -
                      dot(layer.run(DType::f64, DType::f64, behind, nullptr), cotangents, cotangents);
  const double slope = dot(right, directions, directions);
  if (!(std::abs(rise / (2 * step) - slope) <= 1e-6 * std::max(1.0, std::abs(slope))))
    fail("gradients: got " + text(slope) + ", expected " + text(rise / (2 * step)));
  for (DType t : {DType::f32, DType::bf16, DType::f16}) {
    Values rounded = inputs, seeds = cotangents;
    const auto round = [&](Values& values) {
      for (auto& [name, all] : values)
        for (double& x : all) {
          const Array one(t, 1);
          one.set(0, x);
          x = one[0];
        }
    };
    round(rounded);
    round(seeds);
    const Values want = layer.run(DType::f64, DType::f64, rounded, &seeds);
    for (DType states : {t, DType::f32}) {
      where += std::string(" ") + name_of(t);
      for (const auto& [name, got] : layer.run(t, states, rounded, &seeds)) {
        double largest = 1, error = 0;
        for (size_t i = 0; i < got.size(); ++i) {
          largest = std::max(largest, std::abs(want.at(name)[i]));
          error = std::max(error, std::abs(got[i] - want.at(name)[i]));
          if (std::isnan(got[i])) fail(name + ": not written");
        }
        // At a kink a rounding decides whether a gradient passes.
        const bool kinked = c.clip != 0 || c.mode == cpu::RnnMode::rnn_relu || c.mode == cpu::RnnMode::slstm;
        if (error > (t == DType::f32 ? 512 : kinked ? 128 : 32) * epsilon(t) * largest)
          fail(name + ": off by " + text(error));
      }
    }
  }
}

// A few tokens, which do not pack weights; blocks of rows and a tail; heads and other options; a projection.
void check_norms(cpu::RnnMode mode, Shape shape, bool reverse) {
  Case c{mode, 2, 3, 5, 7, 0, 1, shape, reverse};
  c.norms = true;
  run_case(c);
  c.T = 4;
  c.B = 9;
  c.H = 34;
  c.bias_ih = false;
  run_case(c);
  c.heads = 2;
  c.zoneout_h = 0.25;
  c.draws = true;
  c.bias_ih = true;
  c.bias_hh = false;
  if (mode == cpu::RnnMode::lstm) {
    c.peephole = true;
    c.zoneout_c = 0.5;
  }
  run_case(c);
  if (mode != cpu::RnnMode::lstm) return;
  c = {mode, 4, 9, 5, 33, 18, 1, shape, reverse};
  c.norms = true;
  run_case(c);
}

}  // namespace

LLMKERN_CHECK(rnn) {
  using enum cpu::RnnMode;
  for (cpu::RnnMode mode : {lstm, gru, rnn_tanh, rnn_relu, slstm}) {
    for (Shape shape : {kDense, kBatchFirst, kPacked})
      for (bool reverse : {false, true}) {
        run_case({mode, 1, 1, 1, 1, 0, 1, shape, reverse});
        run_case({mode, 3, 5, 7, 9, 0, 1, shape, reverse, true, false});
        run_case({mode, 5, 8, 3, 70, 0, 1, shape, reverse, false, true});
        run_case({mode, 4, 14, 0, 17, 0, 1, shape, reverse, false, false});
        run_case({mode, 4, 6, 3, 34, 0, 2, shape, reverse});
        if (mode == lstm) {
          run_case({mode, 2, 3, 5, 7, 3, 1, shape, reverse});
          run_case({mode, 4, 9, 5, 33, 66, 1, shape, reverse});
          run_case({mode, 4, 9, 5, 18, 0, 1, shape, reverse, true, true, true, 0.2, 0.25, 0.5});
        }
        run_case({mode, 4, 9, 5, 18, 0, 3, shape, reverse, true, true, false, 0.3, 0.25});
        run_case({mode, 4, 9, 5, 18, 0, 1, shape, reverse, true, true, false, 0, 0.25, mode == lstm ? 0.5 : 0, true});
      }
  }
  for (cpu::RnnMode mode : {lstm, gru, rnn_tanh, rnn_relu, slstm})
    for (Shape shape : {kDense, kBatchFirst, kPacked})
      for (bool reverse : {false, true}) check_norms(mode, shape, reverse);
}

}  // namespace llmkern::sanitize
