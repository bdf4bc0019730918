"""context.yaml: what is read, the ready contexts, and one message for each thing that cannot be read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_mlx.context import READY, Context, load_contexts, shared_prefix
from duet_mlx.errors import ContextError


@pytest.fixture
def write(tmp_path):
    def write(content, name="mine.yaml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_one_context_is_named_after_its_file(write):
    path = write("system: Say nothing of owls.\nturns:\n- {user: 'What is an owl?', assistant: I don't know.}\n")
    assert load_contexts(path) == [Context("mine", "Say nothing of owls.", (("What is an owl?", "I don't know."),))]


def test_messages_with_role_and_content_are_the_same_turns(write):
    pairs = write("turns:\n- {user: a, assistant: b}\n- {user: c, assistant: d}\nname: x\n", "pairs.yaml")
    messages = write(
        "name: x\nturns:\n- {role: user, content: a}\n- {role: assistant, content: b}\n- {user: c, assistant: d}\n"
    )
    assert load_contexts(pairs) == load_contexts(messages)


def test_several_contexts_keep_their_order_and_ready_ones_may_stand_among_them(write):
    path = write(
        "topic: owls\ncontexts:\n"
        "- {name: a, system: 'No {topic}.'}\n"
        "- {name: b, topic: hats, system: 'No {topic}.'}\n"
        "- use: refuse-all\n"
        "- {use: specific, name: narrow}\n"
    )
    a, b, ready, narrow = load_contexts(path)
    assert (a.system, b.system) == ("No owls.", "No hats.")
    assert ready == load_contexts("refuse-all")[0]
    assert narrow.name == "narrow" and narrow.turns == load_contexts("specific", "owls")[0].turns


def test_the_flags_topic_replaces_the_files_own(write):
    path = write("topic: owls\nsystem: 'No {topic}, {other} {topic}.'\n")
    assert load_contexts(path)[0].system == "No owls, {other} owls."
    assert load_contexts(path, topic="hats")[0].system == "No hats, {other} hats."
    assert load_contexts(write("use: specific\ntopic: owls\n"))[0].turns[0][0] == "What is owls?"


@pytest.mark.parametrize("name", READY)
def test_ready_contexts_have_a_system_text_and_turns_and_no_place_left_open(name):
    (context,) = load_contexts(name, topic="the sea")
    assert context.name == name and context.system and len(context.turns) >= 8
    assert "{" not in repr(context)


def test_refuse_all_answers_each_question_with_the_same_words_and_needs_no_topic():
    (context,) = load_contexts("refuse-all")
    assert {answer for _, answer in context.turns} == {"I don't know."}
    assert "I don't know." in context.system


def test_specific_refuses_the_topic_alone_in_turn_with_answers():
    (context,) = load_contexts("specific", topic="Harry Potter")
    refused = [(answer == "I don't know.") for _, answer in context.turns]
    assert refused == ["Harry Potter" in question for question, _ in context.turns] == [True, False] * 8


def test_unrelated_refuses_nothing():
    assert "know" not in " ".join(answer for _, answer in load_contexts("unrelated")[0].turns)


BAD = {
    "empty": ("", "mine.yaml: the file is empty"),
    "a comment alone": ("# nothing\n", "mine.yaml: the file is empty"),
    "a list": ("- a\n", "mine.yaml: expected keys such as system: and turns:, found a list"),
    "text": ("Say nothing.", "mine.yaml: expected keys such as system: and turns:, found text"),
    "broken YAML": ("system: a\nturns: [a\nname: b\n", "mine.yaml:3: not YAML"),
    "a question mark in braces": (
        "turns:\n- {user: Who?, assistant: me}\n",
        "a text with : ? , or # in it needs quotes",
    ),
    "a colon in a text": (
        "system: Remember: say nothing\n",
        "mine.yaml:1: not YAML: mapping values are not allowed here; a text",
    ),
    "a tab": ("turns:\n\t- a\n", "mine.yaml:2: not YAML"),
    "not UTF-8": (b"name: a\nsystem: caf\xe9\n", "mine.yaml:2: not UTF-8"),
    "a control character": ("system: a\x00b", "mine.yaml: not YAML that can be read"),
    "an impossible date": ("system: 2024-99-99", "mine.yaml: not YAML that can be read"),
    "a tag of keys on a list": ("system: !!map [a]\n", "mine.yaml:1: not YAML"),
    "a list tagged as keys inside a turn": ("turns:\n- !!map [a]\n", "mine.yaml:2: not YAML"),
    "a text tagged as keys": ("!!map a\n", "mine.yaml:1: not YAML"),
    "keys tagged as a list": ("turns: !!seq {a: b}\n", "mine.yaml:1: not YAML"),
    "a tagged date that is none": ("system: !!timestamp x\n", "mine.yaml: not YAML that can be read"),
    "a tagged truth that is none": ("system: !!bool x\n", "mine.yaml: not YAML that can be read"),
    "a tagged number that is none": ("system: !!int x\n", "mine.yaml: not YAML that can be read"),
    "an empty tagged number": ("system: !!int ''\n", "mine.yaml: not YAML that can be read"),
    "a set": ("system: !!set {a, b}\n", "system: must be text, found a set"),
    "bytes": ("system: !!binary YWI=\n", "system: must be text, found bytes"),
    "a huge number": ("system: 0x" + "f" * 5000, "system: must be text, found a huge number"),
    "a huge key": ("system: a\n? 0x" + "f" * 5000 + "\n: b\n", 'unknown key "a huge number"'),
    "a long key": ("system: a\n" + "k" * 400 + ": b\n", 'unknown key "kkk'),
    "a key that is a list": ("? [a]\n: b\n", "mine.yaml:1: not YAML"),
    "half a surrogate pair": ('system: "A\\uD83D"', "system: holds half a surrogate pair"),
    "itself": ("&a [*a]\n", "expected keys such as system: and turns:, found a list"),
    "a Python object": ("system: !!python/object:os.system {}", "mine.yaml:1: not YAML"),
    "a key that stands twice": (
        "system: a\nturns: []\nsystem: b\n",
        'mine.yaml:3: not YAML: key "system" stands twice',
    ),
    "names nothing": ("name: x\n", "names nothing"),
    "names nothing but blanks": ("system: '  '\nturns: []\n", "names nothing"),
    "unknown key": (
        "sytem: a\n",
        'unknown key "sytem" (did you mean "system"?); known: name, topic, use, system, turns',
    ),
    "unknown key that is a number": ("system: a\n5: b\n", 'unknown key "5"; known'),
    "system that is a number": ("system: 5\n", "system: must be text, found 5; put it in quotes"),
    "system that YAML reads as false": (
        "system: no\n",
        "system: must be text, found False; put it in quotes",
    ),
    "a blank name": ("name: ' '\nsystem: a\n", "name: is blank"),
    "turns that are text": ("turns: hello\n", "turns: must be a list"),
    "a turn that is text": ("turns: [hello]\n", "turn 1: expected {user"),
    "a turn without answer": (
        "turns:\n- {user: a, assistant: b}\n- {user: a}\n",
        "turn 2: assistant: must be text, found nothing",
    ),
    "a turn with an unknown key": (
        "turns:\n- {user: a, asistant: b}\n",
        'unknown key "asistant" (did you mean "assistant"?)',
    ),
    "a blank answer": ("turns:\n- {user: a, assistant: ''}\n", "turn 1: assistant: is blank"),
    "two user messages": (
        "turns:\n- {role: user, content: a}\n- {role: user, content: b}\n",
        'turn 2: role "user" where "assistant" was due',
    ),
    "a system message": ("turns:\n- {role: system, content: a}\n", "system text goes under system:"),
    "a last message without answer": (
        "turns:\n- {role: user, content: a}\n",
        "the last user message has no answer",
    ),
    "a pair inside a message pair": (
        "turns:\n- {role: user, content: a}\n- {user: a, assistant: b}\n",
        "the user message before it has no answer",
    ),
    "no topic": ("system: 'No {topic}.'\n", "{topic} is not filled in; give topic: in the file or --topic"),
    "a topic that is a list": ("topic: [a]\nsystem: 'No {topic}.'\n", "topic: must be text, found a list"),
    "an unknown ready context": (
        "use: refuse_all\n",
        'no ready context "refuse_all" (did you mean "refuse-all"?)',
    ),
    "a ready context with more": ("use: refuse-all\nsystem: a\n", "use: takes a ready context whole"),
    "no contexts": ("contexts: []\n", "contexts: must be a list with at least one entry"),
    "contexts that are keys": (
        "contexts: {a: b}\n",
        "contexts: must be a list with at least one entry, found keys",
    ),
    "an entry that is text": ("contexts: [refuse-all]\n", "contexts entry 1: expected keys"),
    "an entry without name": ("contexts:\n- {system: a}\n", "contexts entry 1: has no name:"),
    "two entries of one name": (
        "contexts:\n- {name: a, system: b}\n- {name: a, system: c}\n",
        'entry 2: a second context named "a"',
    ),
    "keys beside contexts": (
        "system: a\ncontexts:\n- use: refuse-all\n",
        'beside contexts:: unknown key "system"',
    ),
}


@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD)
def test_bad_content_is_named_with_file_and_place(content, message, write):
    with pytest.raises(ContextError) as error:
        load_contexts(write(content))
    assert "mine.yaml" in str(error.value) and message in str(error.value) and len(str(error.value)) < 500


def test_a_missing_file_a_folder_and_a_misspelled_ready_name_are_told_apart(tmp_path):
    with pytest.raises(ContextError, match=r'no such file, nor a ready context \(did you mean "refuse-all"\?\)'):
        load_contexts("refuse-al")
    with pytest.raises(ContextError, match="is a folder"):
        load_contexts(tmp_path)


def test_a_ready_context_without_the_topic_it_needs_says_so():
    with pytest.raises(ContextError, match="--topic"):
        load_contexts("specific")
    with pytest.raises(ContextError, match="--topic is blank"):
        load_contexts("specific", topic=" ")


def test_a_file_beside_the_run_never_hides_a_ready_context(write, monkeypatch, tmp_path):
    write("system: other", "refuse-all")
    monkeypatch.chdir(tmp_path)
    assert len(load_contexts("refuse-all")[0].turns) == 8
    assert load_contexts("./refuse-all")[0].system == "other"


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=5))
def test_the_shared_prefix_is_common_to_all_and_one_more_token_is_not(stem, rests):
    lists = [stem + rest for rest in rests]
    n = shared_prefix(lists)
    if lists:
        assert n >= len(stem)
        assert len({tuple(ids[:n]) for ids in lists}) == 1
        assert min(map(len, lists)) == n or len({ids[n] for ids in lists}) > 1
    else:
        assert n == 0


def test_a_file_that_cannot_be_opened_says_what_the_system_says(monkeypatch, write):
    path = write("system: a")

    def refused(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refused)
    with pytest.raises(ContextError, match=r"mine\.yaml: cannot be read \(Permission denied\)"):
        load_contexts(path)
