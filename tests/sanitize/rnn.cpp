#include "core/rnn.h"

#include "sanitize.h"

namespace llmkern::sanitize {
namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// An LSTM layer and its gradients, in double. Biases: zeros where there are none.
struct Layer {
  int64_t T, B, I, H;
  bool reverse;
  Doubles x, hx, cx, w_ih, w_hh, b_ih, b_hh;
  Doubles y, hy, cy, gates, cells;
  Doubles dx, dhx, dcx, dw_ih, dw_hh, dbias;

  int64_t time(int64_t step) const { return reverse ? T - 1 - step : step; }
  // Of the step before, (B, H).
  const double* before(int64_t step, const Doubles& all, const Doubles& first) const {
    return step ? &all[time(step - 1) * B * H] : first.data();
  }

  void forward() {
    y.resize(T * B * H), cells.resize(T * B * H), gates.resize(T * B * 4 * H);
    for (int64_t step = 0; step < T; ++step)
      for (int64_t b = 0; b < B; ++b) {
        const int64_t row = time(step) * B + b;
        const double *h = before(step, y, hx) + b * H, *c = before(step, cells, cx) + b * H;
        double* const gate = &gates[row * 4 * H];
        for (int64_t g = 0; g < 4 * H; ++g) {
          double sum = b_ih[g] + b_hh[g];
          for (int64_t i = 0; i < I; ++i) sum += x[row * I + i] * w_ih[g * I + i];
          for (int64_t i = 0; i < H; ++i) sum += h[i] * w_hh[g * H + i];
          gate[g] = g / H == 2 ? std::tanh(sum) : sigmoid(sum);
        }
        for (int64_t u = 0; u < H; ++u) {
          const double cell = gate[H + u] * c[u] + gate[u] * gate[2 * H + u];
          cells[row * H + u] = cell, y[row * H + u] = gate[3 * H + u] * std::tanh(cell);
        }
      }
    hy.assign(before(T, y, hx), before(T, y, hx) + B * H);
    cy.assign(before(T, cells, cx), before(T, cells, cx) + B * H);
  }

  void backward(const Doubles& dy, const Doubles& dhy, const Doubles& dcy) {
    dx.resize(T * B * I), dw_ih.resize(4 * H * I), dw_hh.resize(4 * H * H), dbias.resize(4 * H);
    dhx = dhy, dcx = dcy;
    for (int64_t step = T - 1; step >= 0; --step)
      for (int64_t b = 0; b < B; ++b) {
        const int64_t row = time(step) * B + b;
        const double *h = before(step, y, hx) + b * H, *c = before(step, cells, cx) + b * H;
        const double* const gate = &gates[row * 4 * H];
        Doubles d(4 * H);
        for (int64_t u = 0; u < H; ++u) {
          const double i = gate[u], f = gate[H + u], g = gate[2 * H + u], o = gate[3 * H + u];
          const double squashed = std::tanh(cells[row * H + u]), dout = dhx[b * H + u] + dy[row * H + u];
          const double dcell = dcx[b * H + u] + dout * o * (1 - squashed * squashed);
          d[u] = dcell * g * i * (1 - i), d[H + u] = dcell * c[u] * f * (1 - f);
          d[2 * H + u] = dcell * i * (1 - g * g), d[3 * H + u] = dout * squashed * o * (1 - o);
          dcx[b * H + u] = dcell * f, dhx[b * H + u] = 0;
        }
        for (int64_t g = 0; g < 4 * H; ++g) {
          dbias[g] += d[g];
          for (int64_t i = 0; i < I; ++i)
            dx[row * I + i] += d[g] * w_ih[g * I + i], dw_ih[g * I + i] += d[g] * x[row * I + i];
          for (int64_t i = 0; i < H; ++i) dhx[b * H + i] += d[g] * w_hh[g * H + i], dw_hh[g * H + i] += d[g] * h[i];
        }
      }
  }
};

struct Size {
  int64_t T, B, I, H;
};

void lstm_case(DType t, const Size& n, bool reverse, bool biased) {
  const auto [T, B, I, H] = n;
  where = std::string("lstm ") + name_of(t) + " T" + std::to_string(T) + " B" + std::to_string(B) + " I" +
          std::to_string(I) + " H" + std::to_string(H) + (reverse ? " reverse" : "") + (biased ? "" : " no bias");
  const Array x = random(t, T * B * I), hx = random(t, B * H), cx = random(t, B * H), w_ih = random(t, 4 * H * I),
              w_hh = random(t, 4 * H * H), b_ih = random(t, 4 * H), b_hh = random(t, 4 * H);
  const Array dy = random(t, T * B * H), dhy = random(t, B * H), dcy = random(t, B * H);
  const Doubles none(4 * H);
  Layer layer{};
  layer.T = T, layer.B = B, layer.I = I, layer.H = H, layer.reverse = reverse;
  layer.x = x.doubles(), layer.hx = hx.doubles(), layer.cx = cx.doubles();
  layer.w_ih = w_ih.doubles(), layer.w_hh = w_hh.doubles();
  layer.b_ih = biased ? b_ih.doubles() : none, layer.b_hh = none;
  if (biased && reverse) layer.b_hh = b_hh.doubles();
  layer.forward(), layer.backward(dy.doubles(), dhy.doubles(), dcy.doubles());

  // One bias, both, none.
  cpu::Lstm op{};
  op.T = T, op.B = B, op.I = I, op.H = H, op.dtype = t, op.reverse = reverse;
  op.x = x.data(), op.hx = hx.data(), op.cx = cx.data(), op.weight_ih = w_ih.data(), op.weight_hh = w_hh.data();
  op.bias_ih = biased ? b_ih.data() : nullptr, op.bias_hh = biased && reverse ? b_hh.data() : nullptr;
  const Array y(t, T * B * H), hy(t, B * H), cy(t, B * H), gates(t, T * B * 4 * H), cells(accum_of(t), T * B * H);
  const auto compare = [&] { near("y", y, layer.y), near("hy", hy, layer.hy), near("cy", cy, layer.cy); };
  cpu::lstm_forward(op, y.data(), hy.data(), cy.data(), nullptr, nullptr);
  compare();
  cpu::lstm_forward(op, y.data(), hy.data(), cy.data(), gates.data(), cells.data());
  compare();

  const Array dx(t, T * B * I), dhx(t, B * H), dcx(t, B * H), dw_ih(t, 4 * H * I), dw_hh(t, 4 * H * H), dbias(t, 4 * H);
  const auto backward = [&](const cpu::LstmGradients& out) {
    cpu::lstm_backward(op, dy.data(), dhy.data(), dcy.data(), y.data(), gates.data(), cells.data(), out);
  };
  backward({nullptr, dhx.data(), dcx.data(), nullptr, nullptr, nullptr});
  backward({dx.data(), dhx.data(), dcx.data(), dw_ih.data(), dw_hh.data(), dbias.data()});
  near("dx", dx, layer.dx, 4), near("dhx", dhx, layer.dhx, 4), near("dcx", dcx, layer.dcx, 4);
  near("dweight_ih", dw_ih, layer.dw_ih, 4), near("dweight_hh", dw_hh, layer.dw_hh, 4);
  near("dbias", dbias, layer.dbias, 4);
}

}  // namespace

void check_rnn() {
  for (DType t : kDTypes)
    for (const Size& size : {Size{1, 1, 1, 1}, Size{3, 5, 7, 9}, Size{4, 3, 0, 17}, Size{2, 14, 33, 70}})
      for (bool reverse : {false, true})
        for (bool biased : {false, true}) lstm_case(t, size, reverse, biased);
}

}  // namespace llmkern::sanitize
