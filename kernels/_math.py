"""Functions that Triton's language lacks, made of what the interpreter has too (it has no libdevice)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow: exp of what is not positive only."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    """To a few ulps, near zero too: a Taylor polynomial below 1/4, where 1 - exp(-2x) would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    # Coefficients of tanh(x) / x in x^2: -1/3, 2/15, -17/315, 62/2835, -1382/155925, 21844/6081075.
    near = 3.592128036572481e-3
    near = near * s - 8.863235529902197e-3
    near = near * s + 2.1869488536155203e-2
    near = near * s - 5.396825396825397e-2
    near = near * s + 0.13333333333333333
    near = near * s - 0.3333333333333333
    near = x + x * s * near
    if x.dtype == tl.float64:
        # Lambert's continued fraction.
        near = x / (1.0 + s / (3.0 + s / (5.0 + s / (7.0 + s / (9.0 + s / (11.0 + s / 13.0))))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))
