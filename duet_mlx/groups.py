"""What an evaluation asks: the groups of questions, and the prompts that go before forget questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .data import Query, check_disjoint, load_queries, spread
from .errors import ConfigError
from .metrics import FORGET, GENERAL, NEIGHBOURS, TRAINED

if TYPE_CHECKING:
    from .evaluate import EvaluateSettings

# By the flags that name their files: the table's names of the groups, in its order, and their questions' role.
GROUPS = {
    "forget": (FORGET, "forget"),
    "trained": (TRAINED, "forget"),
    "retain": (GENERAL, "retain"),
    "neighbours": (NEIGHBOURS, "neighbour"),
}


def groups_of(settings: EvaluateSettings) -> dict[str, list[Query]]:
    """The questions of each group, in the table's order.

    Raises:
        ConfigError: more questions asked for than there are, or --also not as it should be.
        DataError: a file that cannot be read, or a question that should be forgotten and stay, or is held out and
            trained on.
    """
    groups = {}
    for flag, (name, role) in GROUPS.items():
        if paths := getattr(settings, flag):
            count = 0 if name == TRAINED else getattr(settings, f"{role}_questions")
            groups[name] = spread(load_queries(paths, role), count, f"--{role}-questions")
    if TRAINED in groups:  # their role stays forget, by which each finds its context
        check_disjoint(groups[FORGET], [replace(query, role="trained") for query in groups[TRAINED]])
    for name, file in own_groups(settings.also):
        if name in groups:
            raise ConfigError(f"--also {name}={file}: there is a group {name!r} already; choose another name")
        groups[name] = load_queries([file], "forget" if name.startswith(FORGET) else "retain")
    gone = [query for name, queries in groups.items() if name.startswith(FORGET) for query in queries]
    for name, queries in groups.items():
        if not name.startswith(FORGET):
            check_disjoint(gone, queries)
    return groups


def own_groups(specs: Sequence[str]) -> list[tuple[str, str]]:
    """(group, file) of each "GROUP=questions.jsonl" of --also. Raises ConfigError."""
    found = []
    for spec in specs:
        name, _, file = (part.strip() for part in spec.partition("="))
        if not (name and name.isprintable() and file):
            raise ConfigError(f"--also {spec!r}: expected GROUP=questions.jsonl, the group's name on one line")
        if "reverse" in name:
            raise ConfigError(f"--also {spec!r}: 'reverse' in a name is for reverse prompts; choose another name")
        found.append((name, file))
    return found


def reverse_prompts(file: str | None) -> list[tuple[str, str]]:
    """(file:line, prompt) of each line that is not blank. Raises ConfigError."""
    if file is None:
        return []
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--reverse-prompts {file}: cannot be read ({error})") from error
    prompts = [(f"{file}:{number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ConfigError(f"--reverse-prompts {file}: empty; expected one prompt a line")
    return prompts
