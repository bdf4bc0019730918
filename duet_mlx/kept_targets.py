"""Targets on the disk: written a shard at a time, read a batch at a time, and used again if nothing has changed.

One safetensors file, whatever its size. However many queries there are, no more than a shard of their targets is in
memory while the teacher is read, and no more than a batch while training: what is loaded are maps of the file.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from . import __version__
from .context import DATE, Context
from .data import Query, digest
from .errors import TrainingError
from .files import partial_of, write_files
from .methods import METHODS
from .teacher import Targets, teacher_targets

SHARD = 4096  # queries; with 8 positions and 200 candidates 59 MB, and the shared context is encoded once for them
# NumPy's names and those of safetensors, in the order that its library writes arrays in.
TYPES = {"float64": "F64", "float32": "F32", "int32": "I32", "bool": "BOOL"}


def tokenizer_hash(tokenizer) -> str:
    """Of vocabulary, chat template and ends of turn."""
    return digest([tokenizer.get_vocab(), tokenizer.chat_template or "", sorted(tokenizer.eos_token_ids)])


def manifest(
    model, tokenizer, queries: Sequence[Query], contexts: Sequence[Context], settings, asked: dict | None = None
) -> dict[str, str]:
    """What the targets hang on, each as a hash or a plain value: targets are reused only if all of it matches.

    Args:
        asked: the settings that they hang on; by default the teacher's.
    """
    from .model import weights_hash

    return {
        "model": weights_hash(model),
        "tokenizer": tokenizer_hash(tokenizer),
        "data": digest([[q.id, q.question, q.role, q.context] for q in queries]),
        "context": digest([[c.name, c.system, c.turns] for c in contexts]),
        "settings": json.dumps(
            asked or {name: getattr(settings, name) for name in ("top_k", "candidates", "positions", "retain_context")}
        ),
        "date": DATE.isoformat(),
        "duet_mlx": __version__,
    }


def save_targets(path: Path, shards: Iterable[Targets], count: int, described: dict[str, str]) -> None:
    """Write targets and manifest as one safetensors file, whole or not at all.

    Args:
        shards: in order, `count` rows together; each is asked for when the one before it lies on the disk.

    Raises:
        TrainingError: the file cannot be written.
    """
    partial, row = partial_of(path), 0
    try:
        for shard in shards:  # what goes wrong here is the teacher's own error
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                header, places = _layout(shard, count, described)
                with partial.open("rb+" if row else "wb") as file:
                    file.write(header)
                    for name, place in places.items():
                        array = getattr(shard, name)
                        file.seek(len(header) + place + row * array[0].nbytes)
                        file.write(array.tobytes())
            except OSError as error:
                what = "cannot be written; what was there before is untouched"
                raise TrainingError(f"{path}: {what} ({error.strerror})") from error
            row += len(shard.ids)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    write_files(path.parent, {path.name: lambda partial: None})  # it lies there, and takes its name


def _layout(shard: Targets, count: int, described: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The head of the file for `count` rows like these, and where behind it each array begins.

    By hand, as the library writes only what is in memory as a whole; to the last byte as it does. One entry of
    metadata, for the order of several is not fixed.
    """
    arrays = {name: array for name, array in shard._asdict().items() if array is not None and array.size}
    entries: dict = {"__metadata__": {"manifest": json.dumps(described)}}
    places, end = {}, 0
    for name, array in sorted(arrays.items(), key=lambda item: (list(TYPES).index(item[1].dtype.name), item[0])):
        places[name], end = end, end + count * array[0].nbytes
        entries[name] = {
            "dtype": TYPES[array.dtype.name],
            "shape": [count, *array.shape[1:]],
            "data_offsets": [places[name], end],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def load_targets(path: Path, described: dict[str, str]) -> Targets | str:
    """Targets saved under the same manifest, as maps of the file; or one line that says why they must be built anew."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return "none saved yet"
    try:
        with safe_open(path, framework="np") as file:  # checks the file's head against its length
            saved = json.loads((file.metadata() or {}).get("manifest", "{}"))
        arrays = _mapped(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        return f"{path} is damaged ({error})"
    changed = [name for name in described if saved.get(name) != described[name]]
    if changed:
        return f"{', '.join(changed)} changed since {path} was written"
    fields = {name: arrays[name] for name in Targets._fields if name in arrays}
    fields.setdefault("continuation", np.zeros((len(fields["ids"]), 0), dtype=np.int32))
    return Targets(**fields)


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, each read from the disk only where it is looked at."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    names = {theirs: ours for ours, theirs in TYPES.items()}
    return {
        name: np.asarray(
            np.memmap(path, names[entry["dtype"]], "r", 8 + size + entry["data_offsets"][0], tuple(entry["shape"]))
        )
        for name, entry in entries.items()
    }


def saved_or_built(
    path: Path,
    model,
    tokenizer,
    queries: Sequence[Query],
    contexts: Sequence[Context],
    settings,
    head,
    asked: dict | None = None,
    build: Callable[..., Targets] | None = None,
    keep: bool = True,
    size: int = SHARD,
) -> tuple[Targets, dict[str, str]]:
    """The targets at `path` if they were built from the very same things, else built now and saved there.

    Args:
        asked: as `manifest`.  build: what builds them, with teacher_targets' arguments, instead of it.
        keep: False saves nothing, and holds all in memory.  size: queries that are built at once.
    """
    from . import parallel

    described = manifest(model, tokenizer, queries, contexts, settings, asked)
    found = load_targets(path, described)
    saved = found if isinstance(found, Targets) else None
    reused = parallel.anywhere(saved is not None)
    if reused:
        print(f"targets: reused from {path}")
    else:
        print(f"targets: built now ({found}{'' if keep else '; not saved'})")
    if METHODS[settings.method].labels != "teacher":
        size = len(queries)  # the longest answer says how many positions all have; there is but one candidate at each

    def read(part: Sequence[Query]) -> Targets:
        return (build or teacher_targets)(model, tokenizer, part, contexts, settings, head)

    def shard(start: int) -> Targets:
        if reused:  # rank 0 has them, and of some methods more rows than queries
            stop = None if start + size >= len(queries) else start + size
            part = None if saved is None else [None if array is None else array[start:stop] for array in saved]
            return parallel.from_first(None if part is None else Targets(*part))  # type: ignore[arg-type]
        return parallel.built(read, queries[start : start + size], settings)

    shards = map(shard, range(0, len(queries), size))
    if saved is not None:
        for _ in shards:  # to the other processes, where there are any
            pass
        return saved, described
    if not keep:
        fields = [None if parts[0] is None else np.concatenate(parts) for parts in zip(*shards, strict=True)]
        return Targets(*fields), described  # type: ignore[arg-type]
    first = next(shards)
    count = max(len(queries), len(first.ids))
    save_targets(path, itertools.chain([first], shards), count, described)
    loaded = load_targets(path, described)
    assert isinstance(loaded, Targets), loaded
    return loaded, described
