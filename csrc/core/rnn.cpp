// LSTM layers: a whole sequence in one parallel region.
//
// FLOPs, forward: 2 T B 4H (I + H); backward twice that. The input projection x W_ih^T is one GEMM over all of time,
// and so are, at the end, dx, dW_ih and dW_hh. What remains is the time loop: h W_hh^T forward and dgates W_hh
// backward.
//
// Batch rows never meet in the loop, so each thread takes its rows through all T steps and no barrier is needed. W_hh
// is packed once per call into panels [H / L][k][4 gates][L]: the four gates of L units end in registers together, and
// sigmoid, tanh, c and h follow without a store in between. The backward's panels hold four vectors of units instead,
// and the same loop multiplies both. Cells, h and dgates are carried in fp32 (fp64 for fp64) inside the sequence.
#include "core/rnn.h"

#include <algorithm>

#include "core/gemm.h"
#include "core/memory.h"
#include "core/threads.h"

namespace llmkern::cpu {
namespace {

DType accum_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

const char* at(const void* p, int64_t elements, DType dtype) {
  return static_cast<const char*>(p) + elements * static_cast<int64_t>(itemsize(dtype));
}

// W_hh as panels. Forward: W_hh^T, a panel is the four gates of L units. Backward: W_hh, a panel is 4L units.
Buffer<char> pack(const RnnKernels& kernels, const Lstm& op, bool backward) {
  const DType S = accum_of(op.dtype);
  const int64_t L = S == DType::f64 ? kernels.lanes_f64 : kernels.lanes_f32, H = op.H;
  const int64_t width = backward ? 4 * L : L, K = backward ? 4 * H : H, panels = (H + width - 1) / width;
  const int64_t bytes = K * 4 * L * static_cast<int64_t>(itemsize(S));
  Buffer<char> packed(panels * bytes);
  parallel_for(panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t u = p * width;
      int64_t start[4], valid[4];
      for (int64_t j = 0; j < 4; ++j) {
        start[j] = backward ? u + j * L : j * H + u;
        valid[j] = backward ? H - start[j] : H - u;
      }
      kernels.pack(op.weight_hh, op.dtype, K, backward ? H : 1, backward ? 1 : H, start, valid,
                   packed.get() + p * bytes);
    }
  });
  return packed;
}

// Rows per thread: enough that a panel's load is shared by several.
constexpr int64_t kGrainRows = 2;

}  // namespace

void lstm_forward(const Lstm& op, void* y, void* hy, void* cy, void* gates, void* cells) {
  const DType S = accum_of(op.dtype);
  const int64_t T = op.T, B = op.B, H = op.H, G = 4 * op.H;
  const auto& kernels = LLMKERN_SELECT(rnn);
  const Buffer<char> packed = pack(kernels, op, false);
  // Where the saved gates have the accumulator's type, the projection is written where they will stand.
  const bool in_place = gates && op.dtype == S;
  const Buffer<char> projected(in_place ? 0 : T * B * G * itemsize(S));
  void* const gx = in_place ? gates : projected.get();
  gemm(T * B, G, op.I, {op.x, op.dtype, op.I, false}, {op.weight_ih, op.dtype, op.I, true}, gx, S, G, false);
  parallel_for(B, kGrainRows, [&](int64_t begin, int64_t end) {
    const Buffer<char> state(3 * (end - begin) * H * itemsize(S));
    kernels.lstm_forward({&op, gx, packed.get(), y, hy, cy, gates, cells, state.get(), begin, end});
  });
}

void lstm_backward(const Lstm& op, const void* dy, const void* dhy, const void* dcy, const void* y, const void* gates,
                   const void* cells, const LstmGradients& out) {
  const DType D = op.dtype, S = accum_of(D);
  const int64_t T = op.T, B = op.B, I = op.I, H = op.H, G = 4 * op.H;
  const auto& kernels = LLMKERN_SELECT(rnn);
  const Buffer<char> packed = pack(kernels, op, true);
  const Buffer<char> dgates(T * B * G * itemsize(S));
  parallel_for(B, kGrainRows, [&](int64_t begin, int64_t end) {
    const Buffer<char> state(2 * (end - begin) * H * itemsize(S));
    kernels.lstm_backward(
        {&op, dy, dhy, dcy, gates, cells, packed.get(), dgates.get(), out.dhx, out.dcx, state.get(), begin, end});
  });
  if (out.dx) gemm(T * B, I, G, {dgates.get(), S, G, false}, {op.weight_ih, D, I, false}, out.dx, D, I, false);
  if (!out.dweight_ih) return;
  gemm(G, I, T * B, {dgates.get(), S, G, true}, {op.x, D, I, false}, out.dweight_ih, D, I, false);
  // h before step s is hx for the first and y of the step before for the others. In low precision the two parts are
  // added up in fp32 before they are rounded.
  const Buffer<char> sum(D == S ? 0 : G * H * itemsize(S));
  void* const dweight = D == S ? out.dweight_hh : sum.get();
  const int64_t rest = (T - 1) * B, step = B * G, first = op.reverse ? T - 1 : 0;
  gemm(G, H, B, {at(dgates.get(), first * step, S), S, G, true}, {op.hx, D, H, false}, dweight, S, H, false);
  if (rest)
    gemm(G, H, rest, {at(dgates.get(), op.reverse ? 0 : step, S), S, G, true},
         {at(y, op.reverse ? B * H : 0, D), D, H, false}, dweight, S, H, true);
  if (D != S)
    parallel_for(G * H, 1 << 14, [&](int64_t begin, int64_t end) {
      kernels.sum_rows(sum.get(), D, 1, G * H, begin, end, out.dweight_hh);
    });
  if (out.dbias)
    parallel_for(
        G, 64, [&](int64_t begin, int64_t end) { kernels.sum_rows(dgates.get(), D, T * B, G, begin, end, out.dbias); });
}

}  // namespace llmkern::cpu
