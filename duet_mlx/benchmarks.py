"""The field's benchmarks: TOFU, MUSE, RWKU, WMDP, MMLU and plain questions, from the hub or from local files.

    items = load_benchmark("tofu:forget10")                  # from the hub
    items = load_benchmark("tofu:forget10@data/tofu")        # from a folder of the hub's layout
    items = load_benchmark("qa:forget@questions.csv")        # one file, with the field names that people use

References:
  TOFU: Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", 2024 (arXiv 2401.06121).
  MUSE: Shi et al., "MUSE: Machine Unlearning Six-Way Evaluation for LMs", 2024 (arXiv 2407.06460).
  RWKU: Jin et al., "RWKU: Benchmarking Real-World Knowledge Unlearning for LLMs", 2024 (arXiv 2406.10890).
  WMDP: Li et al., "The WMDP Benchmark: Measuring and Reducing Malicious Use with Unlearning", 2024 (arXiv 2403.03218).
  MMLU: Hendrycks et al., "Measuring Massive Multitask Language Understanding", 2021 (arXiv 2009.03300).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from .errors import ConfigError, DataError, nearest
from .items import Item, read_items

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """A file of a benchmark: whose questions it holds, how they are asked, where it is, where its shots are.

    `words` are the benchmark's own around a question.
    """

    group: str
    kind: str
    path: str
    shots: str = ""
    words: str = "{}"


class Layout(NamedTuple):
    """Where a benchmark's files are in its repository on the hub; {part} is what stands behind the colon."""

    repo: str
    parts: tuple[Part, ...]  # the first must be there; others that are missing are named in a warning
    default: str = ""


_RWKU = "Target/{part}/"
# RWKU also puts "Answer:" into the model's mouth; here the model begins its answer itself.
_CLOZE = "Please complete the blank in the following question.\nQuestion: {}"
_BRIEF = "Please briefly answer the following question.\nQuestion: {}"
LAYOUTS = {
    "tofu": Layout(
        "locuslab/TOFU",
        (
            Part("forget", "qa", "{part}_perturbed"),
            Part("retain", "qa", "retain_perturbed"),
            Part("real authors", "qa", "real_authors_perturbed"),
            Part("world facts", "qa", "world_facts_perturbed"),
        ),
        "forget10",
    ),
    "muse": Layout(
        "muse-bench/MUSE-{part}",
        (
            Part("forget", "knowmem", "knowmem/forget_qa", "knowmem/forget_qa_icl"),
            Part("retain", "knowmem", "knowmem/retain_qa", "knowmem/retain_qa_icl"),
            Part("forget", "verbmem", "verbmem/forget"),
            Part("forget", "privleak", "privleak/forget"),
            Part("holdout", "privleak", "privleak/holdout"),
        ),
        "News",
    ),
    "rwku": Layout(
        "jinzhuoran/RWKU",
        (
            Part("forget, cloze", "qa", f"{_RWKU}forget_level1", words=_CLOZE),
            Part("forget, question", "qa", f"{_RWKU}forget_level2", words=_BRIEF),
            Part("forget, adversarial", "qa", f"{_RWKU}forget_level3", words=_BRIEF),
            Part("neighbours, cloze", "qa", f"{_RWKU}neighbor_level1", words=_CLOZE),
            Part("neighbours, question", "qa", f"{_RWKU}neighbor_level2", words=_BRIEF),
            Part("general", "qa", f"{_RWKU}triviaqa"),
            Part("general", "choice", f"{_RWKU}retain_mmlu"),
        ),
        "2_Confucius",
    ),
    "mmlu": Layout("cais/mmlu", (Part("general", "choice", "{part}/test", "{part}/dev"),), "all"),
    "wmdp": Layout("cais/wmdp", (Part("forget", "choice", "wmdp-{part}/test"),), "bio"),
}


def load_benchmark(spec: str) -> list[Item]:
    """All rows of a benchmark, in order.

    Args:
        spec: "NAME", "NAME:PART" or "NAME:PART@WHERE". NAME is a key of LAYOUTS, or "qa" for one file of questions,
            whose PART is their group. WHERE is a hub id or a local folder of the same layout; for "qa", the file. MMLU
            is also read from Hendrycks' folders dev/ and test/ of CSV files.

    Raises:
        ConfigError: the spec.  DataError: a file is missing or cannot be understood.
    """
    name, part, where = re.fullmatch(r"([^:@]*):?([^@]*)@?(.*)", spec, re.DOTALL).groups()  # type: ignore[union-attr]
    if name == "qa":
        if not where:
            raise ConfigError(f"{spec}: which file? Expected qa:GROUP@FILE")
        return read_items(where, part or "forget", "qa")
    if name not in LAYOUTS:
        raise ConfigError(f"{spec}: no benchmark {name!r}{nearest(name, LAYOUTS)}; there are {', '.join(LAYOUTS)}, qa")
    layout = LAYOUTS[name]
    part = part or layout.default
    if name == "muse":  # its repositories are MUSE-News and MUSE-Books
        part = part.capitalize()
    parts = [p._replace(path=p.path.format(part=part), shots=p.shots.format(part=part)) for p in layout.parts]
    folder = _folder(where or layout.repo.format(part=part), parts)
    if name == "mmlu" and (folder / "test").is_dir():
        parts = [Part("general", "choice", f"test/{s}_test", f"dev/{s}_dev") for s in _subjects(folder, part)]
        if not parts:
            raise DataError(f"{spec}: no file NAME_test.csv in {folder / 'test'}; expected one for each subject")
    items: list[Item] = []
    for number, one in enumerate(parts):
        found = _find(folder, one.path)
        if found is None:
            if number == 0:
                there = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
                raise DataError(f"{spec}: no file {one.path}.json (.jsonl, .csv, .parquet) in {folder}; it has {there}")
            log.warning("%s: no %s in %s, so that part is left out", spec, one.path, folder)
            continue
        rows = read_items(found, one.group, one.kind)
        rows = [replace(row, question=one.words.format(row.question)) for row in rows]
        items += _with_shots(rows, folder, one) if one.shots else rows
    return items


# --- files --------------------------------------------------------------------------------------------------


def _folder(where: str, parts: Sequence[Part]) -> Path:
    """A local folder as it is; a hub id's files, fetched into the hub's own cache."""
    if Path(where).is_dir():
        return Path(where)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", where) is None or Path(where).exists():
        raise DataError(f"{where}: neither a folder nor a hub id like locuslab/TOFU")
    from huggingface_hub import snapshot_download

    patterns = [f"{path}{end}" for p in parts for path in (p.path, p.shots) if path for end in (".*", "-*")]
    try:
        return Path(snapshot_download(where, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the hub's errors, the network's, the proxy's: their first line says it
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{where}: cannot be fetched from the hub ({reason}); give a local folder: …@FOLDER") from error


def _find(folder: Path, path: str) -> Path | None:
    """The file of that path, whatever its suffix (`forget_qa.json`, `forget_qa-00000-of-00001.parquet`).

    A folder named like the file's own may stand for it, so that RWKU's target can be given by itself.
    """
    name = path.rpartition("/")[2]
    parents = [folder / path.rpartition("/")[0]]
    if "/" in path:
        parents += [folder / path.split("/")[-2], folder]
    for parent in parents:
        if not parent.is_dir():
            continue
        same = [
            p for p in sorted(parent.iterdir()) if re.fullmatch(re.escape(name) + r"(-\d+-of-\d+)?(\.\w+)+", p.name)
        ]
        if len(same) > 1:
            raise DataError(f"{parent}: {len(same)} files for {name}: {', '.join(p.name for p in same)}; keep one")
        if same:
            return same[0]
    return None


def _subjects(folder: Path, part: str) -> list[str]:
    """Subjects of Hendrycks' layout: the one named, or all."""
    if part != "all":
        return [part]
    return sorted(file.name.removesuffix("_test.csv") for file in (folder / "test").glob("*_test.csv"))


def _with_shots(rows: list[Item], folder: Path, part: Part) -> list[Item]:
    """Each row with the examples of its subject before it."""
    found = _find(folder, part.shots)
    if found is None:
        log.warning("no %s in %s: %s is asked without examples", part.shots, folder, part.path)
        return rows
    by_subject: dict[str, list[Item]] = {}
    for shot in read_items(found, part.group, part.kind):
        by_subject.setdefault(shot.subject, []).append(shot)
    return [replace(row, shots=tuple(by_subject.get(row.subject, ()))) for row in rows]
