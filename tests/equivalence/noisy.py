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

import random
from collections.abc import Callable
from typing import Any

import numpy as np

UNIT = 2.0**-24  # u, the largest relative error of one rounding to float32
LAMBDA = 8.0
EXACT = {np.negative, np.positive, np.absolute, np.sign, np.maximum, np.minimum, np.clip}
LIBRARY = {np.exp, np.tanh, np.sin, np.cos}
# ±u is read from here, each time from a random place: drawing each sign anew takes four times as long.
ERRORS = np.random.default_rng(0).choice([-UNIT, UNIT], size=2**20)
FACTORS = 1 + ERRORS  # what one relative rounding makes of a value


class Noisy(np.ndarray):
    """A float64 array whose every operation is followed by random noise of the size of float32's rounding."""

    rng = random.Random()

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        plain = [x.view(np.ndarray) if isinstance(x, Noisy) else x for x in inputs]
        if method == "at":
            return ufunc.at(*plain)
        result = np.asarray(getattr(ufunc, method)(*plain, **options))
        if result.dtype == np.float64 and ufunc not in EXACT:
            result = _moved(ufunc, method, plain, options, result, self.rng)
        if out is not None:
            np.asarray(out[0])[...] = result
            return out[0]
        return result.view(Noisy) if result.dtype == np.float64 else result

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        result = super().__array_function__(func, types, args, kwargs)
        return result.view(Noisy) if type(result) is np.ndarray and result.dtype == np.float64 else result


def _moved(ufunc: Any, method: str, inputs: list[Any], options: dict[str, Any], result: Any, rng: Any) -> Any:
    """Each entry of the result, moved by b_i up or down."""
    start = int(rng.random() * (len(ERRORS) - result.size))
    place = slice(start, start + result.size)
    if ufunc is not np.matmul and method != "reduce" and ufunc is not np.power and ufunc not in LIBRARY:
        return result * FACTORS[place].reshape(result.shape)  # a factor: -inf, a masked score, stays
    by = ERRORS[place].reshape(result.shape)  # ±u
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
    """The same dictionaries and named tuples, with `Noisy` for each array of float64."""
    if isinstance(tree, dict):
        return {key: noisy(value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(noisy, tree))
    return tree.view(Noisy) if isinstance(tree, np.ndarray) and tree.dtype == np.float64 else tree


def rounding_bounds(compute: Callable[[], dict[Any, Any]], exact: dict[Any, Any], runs: int = 8) -> dict[Any, float]:
    """λ times the root mean square, over some runs with noise, of the distance to each result, taken as one vector."""
    squares = dict.fromkeys(exact, 0.0)
    for _ in range(runs):
        for name, value in compute().items():
            squares[name] += ((np.asarray(value) - exact[name]) ** 2).sum() / runs
    return {name: LAMBDA * float(np.sqrt(square)) for name, square in squares.items()}
