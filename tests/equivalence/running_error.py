"""What rounding may do to a result at worst, found by running the reference on numbers that carry their own error.

Running error analysis (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.3): a `Bounded` array
holds values and, for each, a bound on how far the same value computed with unit roundoff u may be off. Each operation
hands on the errors that come in and adds its own:

  + - * / x²      4 u |y|. The reference rounds once; MLX, which finds gradients by the chain rule, up to four times
                  where the reference multiplies by one derived factor.
  a sum           (s-1) u Σ|a| for s terms in any order
  exp             (8 + |x|) u y: a library's 8, and x itself rounded or reduced
  log, tanh       8 u |y|
  log(1 + e^x)    8 u |y|, and what an error of x makes of it, by the factor e^error at most, since its slope is
                  less than its value

What comes in goes through the exact slope, or a bound of it where the error may have moved it. What underflows is lost
by no more than the smallest normal number.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class Bounded(np.lib.mixins.NDArrayOperatorsMixin):
    """Values, and a bound on the error of each. Knows the operations that the losses of the reference need."""

    def __init__(self, value: Any, error: Any, unit: float):
        self.value, self.unit = np.asarray(value, dtype=np.float64), unit
        self.error = np.broadcast_to(np.asarray(error, dtype=np.float64), self.value.shape)
        self.tiny = float(np.finfo(np.float32 if unit > 1e-10 else np.float64).tiny)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, key: Any) -> Bounded:
        return Bounded(self.value[key], self.error[key], self.unit)

    def max(self, **options: Any) -> Bounded:
        return Bounded(self.value.max(**options), self.error.max(**options), self.unit)

    def sum(self, **options: Any) -> Bounded:
        value = self.value.sum(**options)
        terms = self.value.size / max(1, value.size)
        own = terms * self.unit * (np.abs(self.value) + self.error).sum(**options)
        return Bounded(value, self.error.sum(**options) + own, self.unit)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        assert method == "__call__" and not options, (ufunc, method, options)
        values = [x.value if isinstance(x, Bounded) else np.asarray(x) for x in inputs]
        errors = [x.error if isinstance(x, Bounded) else 0.0 for x in inputs]
        y = ufunc(*values)
        return Bounded(y, RULES[ufunc](self.unit, y, *values, *errors) + self.tiny, self.unit)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        assert function in (np.where, np.take_along_axis), function  # they choose, and round nothing
        # A plain number among the choices is a 0, whose error is 0 too.
        parts = [[getattr(x, k) if isinstance(x, Bounded) else x for x in args] for k in ("value", "error")]
        return Bounded(*(function(*part, **kwargs) for part in parts), self.unit)


def _add(u: float, y: Any, a: Any, b: Any, ea: Any, eb: Any) -> Any:
    return ea + eb + 4 * u * np.abs(y)


def _multiply(u: float, y: Any, a: Any, b: Any, ea: Any, eb: Any) -> Any:
    return np.abs(a) * eb + np.abs(b) * ea + ea * eb + 4 * u * np.abs(y)


def _divide(u: float, y: Any, a: Any, b: Any, ea: Any, eb: Any) -> Any:
    return (ea + np.abs(y) * eb) / (np.abs(b) - eb) + 4 * u * np.abs(y)


def _exp(u: float, y: Any, x: Any, e: Any) -> Any:
    return y * np.expm1(e + (8 + np.abs(x)) * u)


def _softplus(u: float, y: Any, zero: Any, x: Any, _: Any, e: Any) -> Any:
    return np.minimum(e, y * np.expm1(e)) + 8 * u * y


RULES: dict[Any, Any] = {
    np.add: _add,
    np.subtract: _add,
    np.multiply: _multiply,
    np.divide: _divide,
    np.negative: lambda u, y, x, e: e,
    np.power: lambda u, y, x, two, e, _: 2 * np.abs(x) * e + e**2 + 4 * u * np.abs(y),
    np.exp: _exp,
    np.log: lambda u, y, x, e: e / (x - e) + 8 * u * np.abs(y),
    np.tanh: lambda u, y, x, e: (1 - y**2 + 2 * e) * e + 8 * u * np.abs(y),  # the slope's own slope is below 1
    np.logaddexp: _softplus,  # of 0 and x alone
}
