"""Numbers that rounding has moved: what float32 may do to a result of the reference, found by running the reference.

To first order a float32 result differs from the exact one by Σ J_i δ_i: δ_i is the rounding error of operation i and
J_i what the result makes of it. Each δ_i has a known bound b_i. A `Noisy` array moves the result of each operation by
b_i, up or down at random, so the square of the error that this brings is Σ |J_i|² b_i² on average, and a few runs
estimate it. If rounding errors are independent and of mean 0, an error beyond λ times the root of that sum has a
probability below 2 exp(-λ²/2) (Hoeffding; Pinelis where the result is a vector), 3e-14 for λ = 8. That the root is an
estimate matters more: were real errors as large as ±b_i, one in 20,000 would pass 8 times the estimate of 8 runs
(Student's t). They are not, most being far below b_i: the largest of 2,340 results was 0.04 of its bound.

Without the assumption, Cauchy and Schwarz give √M times the root for M roundings. With the 2 to 45 million of one step
here, this worst case is 17 % of a value in the median, and up to all of it: it would pass nearly anything.

b_i, in units u = 2^-24 (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, chapters 2 and 3):
  + - * / √           u |y|, one rounding
  exp, tanh, sin, cos 8 u |y|, a library's
  x^t                 u (8 + 4 |ln y|) |y|: by way of exp(t ln x), whose argument is rounded too
  a sum of s products √s u Σ|a b|: each of the s-1 partial sums is rounded, and is at most Σ|a b|; the products together
                      make one more. Independent, their variances add up.

References:
  Parker, "Monte Carlo Arithmetic", 1997 (UCLA CSD-970002).
  Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41, 2019.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

UNIT = 2.0**-24  # u, the largest relative error of one rounding to float32
LAMBDA = 8.0
COPIES = 8  # runs with noise
EXACT = {np.negative, np.positive, np.absolute, np.sign, np.maximum, np.minimum, np.clip}
LIBRARY = {np.exp, np.tanh, np.sin, np.cos}
# ±u is read from here, each time from a random place: drawing each sign anew takes four times as long.
ERRORS = np.random.default_rng(0).choice([-UNIT, UNIT], size=2**21)
FACTORS = 1 + ERRORS  # what one relative rounding makes of a value


class Noisy(np.lib.mixins.NDArrayOperatorsMixin):
    """A float64 array, to the reference, of which there are COPIES: each has its own noise, of the size of float32's
    rounding, after every operation.

    All copies take one operation together, `values` [COPIES or 1, *shape], where NumPy's own cost is most of the time.
    Of NumPy it knows what the reference uses of it, and refuses the rest.
    """

    rng = random.Random()

    def __init__(self, values: Any):
        self.values = values

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape[1:]

    @property
    def ndim(self) -> int:
        return self.values.ndim - 1

    @property
    def T(self) -> Noisy:
        return Noisy(self.values.transpose(0, *range(self.ndim, 0, -1)))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Noisy:
        return Noisy(self.values[(slice(None), *key) if isinstance(key, tuple) else (slice(None), key)])

    def __setitem__(self, key: Any, value: Noisy) -> None:
        self.values[(slice(None), *key)] = value.values

    def reshape(self, *shape: Any) -> Noisy:
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        return Noisy(self.values.reshape(len(self.values), *shape))

    def swapaxes(self, a: int, b: int) -> Noisy:
        return Noisy(self.values.swapaxes(_behind_copies(a), _behind_copies(b)))

    def max(self, **options: Any) -> Noisy:
        return np.maximum.reduce(self, **options)

    def sum(self, axis: Any = None, **options: Any) -> Noisy:
        return np.add.reduce(self, axis=axis, **options)

    def mean(self, axis: Any = None, **options: Any) -> Noisy:
        total = self.sum(axis, **options)
        return total / (math.prod(self.shape) / max(1, math.prod(total.shape)))

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        if method == "at":
            target, places, more = inputs
            return ufunc.at(target.values, (slice(None), *places), more.values)
        plain = _aligned(inputs)
        if method == "reduce":
            axis = options.get("axis")
            axes = range(inputs[0].ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
            options["axis"] = tuple(map(_behind_copies, axes))
        result = getattr(ufunc, method)(*plain, **options)
        if result.dtype == np.float64 and ufunc not in EXACT:
            result = _moved(ufunc, method, plain, options, result, self.rng)
        if out is None:
            return Noisy(result)
        out[0].values = result
        return out[0]

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        if function in (np.zeros_like, np.empty_like):  # to be filled, with other numbers in each copy
            return Noisy(function(args[0].values, shape=(COPIES, *args[0].shape)))
        if function in (np.where, np.clip):
            return Noisy(function(*_aligned(args)))
        if function is np.repeat:
            return Noisy(np.repeat(self.values, args[1], axis=_behind_copies(options["axis"])))
        if function is np.take_along_axis:
            return Noisy(np.take_along_axis(self.values, args[1][None], axis=_behind_copies(options["axis"])))
        return NotImplemented


def _behind_copies(axis: int) -> int:
    return axis + 1 if axis >= 0 else axis


def _aligned(arrays: Sequence[Any]) -> list[Any]:
    """The values of each, with axes of size 1 behind the copies' so that all have as many: NumPy adds them in front."""
    most = max(getattr(a, "ndim", 0) for a in arrays)
    alike = [(len(a.values), *(1,) * (most - a.ndim), *a.shape) if isinstance(a, Noisy) else () for a in arrays]
    return [a.values.reshape(shape) if shape else a for a, shape in zip(arrays, alike, strict=True)]


def _moved(ufunc: Any, method: str, inputs: list[Any], options: dict[str, Any], result: Any, rng: Any) -> Any:
    """Each entry of the result in each copy, moved by b_i up or down."""
    shape = (COPIES, *result.shape[1:])
    count = math.prod(shape)
    start = int(rng.random() * (len(ERRORS) - count))
    place = slice(start, start + count)
    if ufunc is not np.matmul and method != "reduce" and ufunc is not np.power and ufunc not in LIBRARY:
        return result * FACTORS[place].reshape(shape)  # a factor: -inf, a masked score, stays
    by = ERRORS[place].reshape(shape)  # ±u
    if ufunc is np.matmul:
        return result + by * np.sqrt(inputs[0].shape[-1]) * (np.abs(inputs[0]) @ np.abs(inputs[1]))
    if method == "reduce":
        terms = inputs[0].size / max(1, result.size)
        return result + by * np.sqrt(terms) * np.add.reduce(np.abs(inputs[0]), **options)
    if ufunc is np.power:
        size = np.abs(result)
        return result * (1 + by * (8 + 4 * np.abs(np.log(size, out=np.zeros_like(size), where=size > 0))))
    return result * (1 + 8 * by)


def noisy(tree: Any) -> Any:
    """The same dictionaries and named tuples, with `Noisy` for each array of float64; there are no errors in it yet."""
    if isinstance(tree, dict):
        return {key: noisy(value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(noisy, tree))
    return Noisy(tree[None]) if isinstance(tree, np.ndarray) and tree.dtype == np.float64 else tree


def rounding_bounds(found: dict[Any, Any], exact: dict[Any, Any]) -> dict[Any, float]:
    """λ times the root mean square, over the copies, of the distance to each exact result, taken as one vector."""
    errors = {name: value.values - np.asarray(exact[name]) for name, value in found.items()}
    return {name: LAMBDA * float(np.sqrt((error**2).sum() / len(error))) for name, error in errors.items()}
