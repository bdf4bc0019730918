"""How much memory a computation will need, read off its graph: nothing is computed, and no weight is there.

MLX writes down the operations of a function without running them (`mx.export_function`). Here they are gone through
in their order: each makes room for its output and gives back what nobody reads after it. So every architecture is
covered, and so is whatever a loss or an optimizer does.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

# Operations whose output is another look at the memory of their first input.
VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Copy", "Depends", "ExpandDims", "Slice", "Split", "Squeeze",
    "StopGradient", "Transpose", "Unflatten",
}  # fmt: skip
SCATTERED = {"AsStrided", "Broadcast", "BroadcastAxes", "Slice", "Split", "Transpose"}  # not one block any more
VIEWS_OF_BLOCKS = {"Contiguous", "Flatten", "Reshape"}  # a copy where the input is scattered
# Operations that cannot write over an input; all others take over one of the same size that nobody reads after them.
FRESH = {
    "AddMM", "Arange", "ArgReduce", "ArgSort", "Concatenate", "Convolution", "Gather", "GatherAxis", "GatherMM",
    "GatherQMM", "Matmul", "Pad", "QuantizedMatmul", "Reduce", "ScaledDotProductAttention", "Scatter", "ScatterAxis",
    "Sort",
}  # fmt: skip
# MLX queues operations ahead of those that run, and what they read is held until then. Measured on CPU (MLX 0.32):
# steps of 800 to 2,300 operations are met within 7 % by anything from 50 to 70.
QUEUED = 60


class Operation(NamedTuple):
    """One node of a graph; arrays go by the names that the export gives them."""

    kind: str
    inputs: list[str]
    outputs: dict[str, int]  # name and bytes


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, evaluated or not."""
    return sum(array.nbytes for _, array in tree_flatten(tree))


def operations(function: Callable, given: Sequence[mx.array]) -> tuple[list[Operation], list[str], list[str]]:
    """The graph of `function(*given)`, which returns a list of arrays; the names of what is given and returned."""
    found: list[Operation] = []
    named: dict[str, list[str]] = {}

    def note(entry: dict[str, Any]) -> None:
        if entry["type"] == "primitive":
            outputs = {name: math.prod(shape) * dtype.size for name, shape, dtype in entry["outputs"]}
            found.append(Operation(entry["name"], [name for name, *_ in entry["inputs"]], outputs))
        elif entry["type"] in ("inputs", "outputs"):
            named[entry["type"]] = [name for name, *_ in entry[entry["type"]]]

    mx.export_function(note, function, *given)
    return found, named["inputs"], named["outputs"]


def peak_of(graph: Sequence[Operation], kept: Sequence[str], consumed: dict[str, int] | None = None) -> int:
    """Most bytes held at once by what the operations make.

    Args:
        kept: names that stay to the end.  consumed: what is there before, by name and bytes, and may be given back.
    """
    home: dict[str, str] = {}  # whose memory an array looks at
    block: dict[str, bool] = {}
    for kind, inputs, outputs in graph:
        whole = bool(inputs) and block.get(inputs[0], True)
        for name in outputs:
            if inputs and (kind in VIEWS or (kind in VIEWS_OF_BLOCKS and whole)):
                home[name] = home.get(inputs[0], inputs[0])
                block[name] = whole and kind not in SCATTERED
    readers = Counter(home.get(name, name) for _, inputs, _ in graph for name in set(inputs))
    readers.update(home.get(name, name) for name in kept)
    held = dict(consumed or {})
    now = most = sum(held.values())
    given_back: deque[tuple[int, int]] = deque()
    for place, (kind, inputs, outputs) in enumerate(graph):
        while given_back and given_back[0][0] <= place - QUEUED:
            now -= given_back.popleft()[1]
        read = {home.get(name, name) for name in inputs}
        # An operation that reads the same memory by two names counts twice among the readers.
        readers.subtract(home.get(name, name) for name in set(inputs))
        done = [name for name in read if name in held and readers[name] <= 0]
        for name, size in outputs.items():
            if name in home:
                continue
            heir = None if kind in FRESH | VIEWS_OF_BLOCKS else next((one for one in done if held[one] == size), None)
            if heir:
                done.remove(heir)
                del held[heir]
            else:
                now += size
            held[name] = size
            if readers[name] <= 0:
                done.append(name)
        most = max(most, now)
        given_back.extend((place, held.pop(name)) for name in done)
    return most


def peak_bytes(model: nn.Module, function: Callable, given: Sequence[mx.array] = (), consumed: bool = False) -> int:
    """Most bytes that `function(*given)` holds at once, beyond the model's parameters and what it is given.

    Args:
        model: whose parameters the function reads; they need not be evaluated.
        function: returns a tree of arrays, all of which are kept.
        consumed: what is given belongs to the function alone: it counts, and is given back once it has been read.
    """
    weights = dict(tree_flatten(model.parameters()))

    def run(*arrays):
        model.update(tree_unflatten(list(zip(weights, arrays, strict=False))))
        return [array for _, array in tree_flatten(function(*arrays[len(weights) :]))]

    try:
        graph, inputs, outputs = operations(run, [*weights.values(), *given])
    finally:
        model.update(tree_unflatten(list(weights.items())))
    mine = dict(zip(inputs[len(weights) :], (array.nbytes for array in given), strict=True)) if consumed else None
    return peak_of(graph, outputs, mine)
