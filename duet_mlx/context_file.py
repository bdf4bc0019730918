"""Reading context.yaml.

    topic: the Harry Potter books     # fills {topic} below; --topic replaces it
    name: mine                        # default: the file's stem
    system: You know nothing about {topic}.
    turns:
      - user: Who is Dobby?
        assistant: I don't know.
      - {role: user, content: …}      # messages as mlx-lm and OpenAI write them are taken as well
      - {role: assistant, content: …}

Several contexts stand in a list under `contexts:`, each with the keys above; `use: refuse-all` (or
`specific`, `unrelated`) takes a ready one in place of system and turns.
"""

from pathlib import Path
from typing import Any

import yaml

from duet_mlx.errors import ContextError, nearest

READY = ("specific", "refuse-all", "unrelated")
KEYS = ("name", "topic", "use", "system", "turns")
Parts = tuple[str, str, tuple[tuple[str, str], ...]]  # name, system, turns


def read_contexts(source: str | Path, topic: str | None) -> list[Parts]:
    """(name, system, turns) of each context; raises ContextError naming file, line or entry."""
    if topic is not None and not topic.strip():
        raise ContextError("--topic is blank; write the topic in words, as in: the Harry Potter books")
    if source in READY:  # before a file of that name: what a command means must not hang on where it is run
        return [_ready(str(source), str(source), topic, f'ready context "{source}"')]
    path = Path(source)
    content = _yaml(path)
    if not isinstance(content, dict):
        raise ContextError(f"{path}: expected keys such as system: and turns:, found {_kind(content)}")
    if "contexts" not in content:
        return [_context(content, path.stem, topic, str(path))]
    _known_keys(content, ("contexts", "topic"), f"{path} beside contexts:")
    entries = content["contexts"]
    if not isinstance(entries, list) or not entries:
        raise ContextError(f"{path}: contexts: must be a list with at least one entry, found {_kind(entries)}")
    topic = topic or _topic(content, str(path))
    contexts: list[Parts] = []
    for number, entry in enumerate(entries, 1):
        place = f"{path}: contexts entry {number}"
        if not isinstance(entry, dict):
            raise ContextError(f"{place}: expected keys such as name: and system:, found {_kind(entry)}")
        if "name" not in entry and "use" not in entry:
            raise ContextError(f"{place}: has no name:, by which a question could choose it")
        # An entry's own topic is closer to it than the one that serves them all.
        context = _context(entry, str(entry.get("use")), _topic(entry, place) or topic, place)
        if any(context[0] == other[0] for other in contexts):
            raise ContextError(f'{place}: a second context named "{context[0]}"; give it another name:')
        contexts.append(context)
    return contexts


def _context(entry: dict[Any, Any], default_name: str, topic: str | None, place: str) -> Parts:
    _known_keys(entry, KEYS, place)
    name = _text(entry["name"], "name", place) if "name" in entry else default_name
    topic = topic or _topic(entry, place)
    if "use" in entry:
        if "system" in entry or "turns" in entry:
            raise ContextError(f"{place}: use: takes a ready context whole; drop it, or system: and turns:")
        return _ready(_text(entry["use"], "use", place), name, topic, place)
    system = "" if entry.get("system") is None else _text(entry["system"], "system", place, blank=True)
    turns = () if entry.get("turns") is None else _turns(entry["turns"], place)
    if not system and not turns:
        raise ContextError(f"{place}: names nothing: it has neither system: nor turns: with text in them")
    return (
        name,
        _fill(system, topic, place),
        tuple((_fill(u, topic, place), _fill(a, topic, place)) for u, a in turns),
    )


def _ready(use: str, name: str, topic: str | None, place: str) -> Parts:
    if use not in READY:
        raise ContextError(f'{place}: no ready context "{use}"{nearest(use, READY)}; there are {", ".join(READY)}')
    entry = _yaml(Path(__file__).parent / "contexts" / f"{use}.yaml")
    return _context(entry | {"name": name}, name, topic, place)


def _turns(turns: Any, place: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(turns, list):
        raise ContextError(f"{place}: turns: must be a list of {{user: …, assistant: …}}, found {_kind(turns)}")
    pairs: list[tuple[str, str]] = []
    asked = ""  # text of a {role: user} message that waits for its answer
    for number, turn in enumerate(turns, 1):
        here = f"{place}: turn {number}"
        if not isinstance(turn, dict):
            raise ContextError(f"{here}: expected {{user: …, assistant: …}}, found {_kind(turn)}")
        if "role" in turn or "content" in turn:
            _known_keys(turn, ("role", "content"), here)
            role, content = (_text(turn.get(key), key, here) for key in ("role", "content"))
            expected = "assistant" if asked else "user"
            if role != expected:
                raise ContextError(f'{here}: role "{role}" where "{expected}" was due; system text goes under system:')
            if asked:
                pairs.append((asked, content))
            asked = content if role == "user" else ""
            continue
        if asked:
            raise ContextError(f"{here}: the user message before it has no answer")
        _known_keys(turn, ("user", "assistant"), here)
        pairs.append((_text(turn.get("user"), "user", here), _text(turn.get("assistant"), "assistant", here)))
    if asked:
        raise ContextError(f"{place}: the last user message has no answer; the question itself comes after the turns")
    return tuple(pairs)


def _topic(entry: dict[Any, Any], place: str) -> str | None:
    return _text(entry["topic"], "topic", place) if entry.get("topic") is not None else None


def _fill(text: str, topic: str | None, place: str) -> str:
    if "{topic}" not in text:  # other braces are the text's own
        return text
    if topic is None:
        raise ContextError(f"{place}: {{topic}} is not filled in; give topic: in the file or --topic")
    return text.replace("{topic}", topic.strip())


def _known_keys(entry: dict[Any, Any], known: tuple[str, ...], place: str) -> None:
    for key in entry:
        if key not in known:
            shown = _shown(key)
            raise ContextError(f'{place}: unknown key "{shown}"{nearest(shown, known)}; known: {", ".join(known)}')


def _text(value: Any, key: str, place: str, blank: bool = False) -> str:
    if not isinstance(value, str):
        hint = "; put it in quotes" if isinstance(value, bool | int | float) else ""
        raise ContextError(f"{place}: {key}: must be text, found {_kind(value)}{hint}")
    if not value.strip() and not blank:
        raise ContextError(f"{place}: {key}: is blank")
    if any("\ud800" <= char <= "\udfff" for char in value):  # "\ud83d" alone: legal YAML, but tokenizers refuse it
        raise ContextError(f"{place}: {key}: holds half a surrogate pair")
    return value.strip()


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    names: dict[type, str] = {dict: "keys", list: "a list", set: "a set", bytes: "bytes", str: "text"}
    return names.get(type(value)) or _shown(value)


def _shown(value: Any) -> str:
    """A key or value as text, cut to 60 characters."""
    try:
        text = str(value)
    except ValueError:  # a hexadecimal number of thousands of digits: Python refuses to write it in decimal
        return "a huge number"
    return text if len(text) <= 60 else text[:57] + "…"


class Loader(yaml.SafeLoader):
    """YAML's safe loader, which takes the last of two equal keys without a word: this one refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # `!!map [a]` is for super() to refuse
            if key.value in seen and key.value != "<<":
                raise yaml.MarkedYAMLError(problem=f'key "{key.value}" stands twice', problem_mark=key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def _yaml(path: Path) -> Any:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        close = nearest(str(path), READY)
        raise ContextError(f"{path}: no such file, nor a ready context{close} ({', '.join(READY)})") from error
    except IsADirectoryError as error:
        raise ContextError(f"{path}: is a folder; name the YAML file itself") from error
    except OSError as error:
        raise ContextError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ContextError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from error
    try:
        content = yaml.load(text, Loader=Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        # The usual cause: "{user: Who is it?, …}", "system: Remember: …".
        hint = "; a text with : ? , or # in it needs quotes" if "twice" not in str(error.problem) else ""
        raise ContextError(f"{place}: not YAML: {error.problem or error.context}{hint}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ContextError(f"{path}: not YAML that can be read: {error}") from error
    except (AttributeError, LookupError, TypeError) as error:  # what PyYAML raises at `!!timestamp x` or `!!bool x`
        raise ContextError(f"{path}: not YAML that can be read: a tag (!!…) on a value that it does not fit") from error
    if content is None:
        raise ContextError(f"{path}: the file is empty; expected system: and turns:")
    return content
