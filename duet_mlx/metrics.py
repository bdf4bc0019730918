"""What an evaluation measures: each metric once, from its definition, one score a question.

Every score is a float in [0, 1], or None where it is undefined for that question; `summarise` leaves the
undefined ones out, so a value's `n` is the number of questions that it is the mean of.

`target` is always the base model's own greedy answer to the plain question (no context, no reverse prompt).

References:
  Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004 (ROUGE-L).
  Efron and Tibshirani, "An Introduction to the Bootstrap", 1993 (percentile intervals).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

FORGET, GENERAL, NEIGHBOURS = "forget", "general", "neighbours"
TRAINED = f"{FORGET}, trained on"  # forget questions that the adapter has seen; the others are held out


@dataclass(frozen=True)
class Metric:
    """A measure; `forget`, `keep`: what is good on forget groups and on the others (higher, lower, none)."""

    key: str
    label: str
    forget: str
    keep: str
    definition: str

    def direction(self, group: str) -> str:
        return self.forget if group.startswith(FORGET) else self.keep


METRICS = (
    Metric(
        "recall",
        "recall of the base's answer",
        "lower",
        "higher",
        "ROUGE-L recall (as rouge-score, no stemmer) of the base's own answer to the plain question",
    ),
    Metric(
        "recall_floor",
        "chance floor of that recall",
        "none",
        "none",
        "the same recall of the base's answers to the group's other questions, averaged over all of them: "
        "what shuffling the answers gives in expectation if none stays in its place",
    ),
    Metric(
        "recall_gold",
        "recall of the gold answer",
        "lower",
        "higher",
        "ROUGE-L recall, no stemmer, of the gold answer (the best of several) on the questions that the base got "
        "right: its own answer to the plain question holds every word of a gold answer, in order",
    ),
    Metric("f1", "F1 with the base's answer", "lower", "higher", "ROUGE-L F1, no stemmer, with the base's own answer"),
    Metric(
        "refused",
        "refused",
        "higher",
        "lower",
        "share of refusals (REFUSAL_PATTERNS) among the questions that the base, asked in the same words, "
        "does not refuse; 0 for the base by definition",
    ),
    Metric("refused_all", "refused, of all questions", "higher", "lower", "share of refusals among all questions"),
    Metric(
        "broken",
        "broken",
        "lower",
        "lower",
        "share of answers without a word, or with one 4-gram of words three times",
    ),
    Metric(
        "perplexity",
        "perplexity under the base",
        "lower",
        "lower",
        "of the model's answer, under the base without context: exp of the mean over questions of the mean negative "
        "log-probability of its tokens (of one question, samples.jsonl has that mean itself); high where an answer "
        "is no language, low where it repeats itself: see broken",
    ),
    Metric(
        "probability",
        "probability of the base's words",
        "lower",
        "higher",
        "mean probability of the content words in the base's own answer, a word's being the product of its "
        "tokens', and what comes before each token being forced on the model (under base + context: behind "
        "the context); content words are all but function words and words of the question",
    ),
)
BY_KEY = {metric.key: metric for metric in METRICS}


# --- ROUGE-L ------------------------------------------------------------------------------------------------


def rouge_words(text: str) -> tuple[str, ...]:
    """Words as rouge-score cuts them: lower case, runs of a-z and 0-9, no stemmer."""
    # Its tokenize module alone: rouge_scorer imports all of nltk, which takes seconds and is not needed here.
    from rouge_score.tokenize import tokenize

    return tuple(tokenize(text, None))


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, with the bits of one integer for a row of the table.

    The chance floor needs it for every pair of a group's answers, and rouge-score's table is 30 times slower.
    References: Hyyrö, "Bit-parallel LCS-length computation revisited", 2004.
    """
    where: dict[str, int] = {}
    for i, word in enumerate(first):
        where[word] = where.get(word, 0) | 1 << i
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        hits = row & where.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(first) - row.bit_count()


def rouge_l(target: Sequence[str], answer: Sequence[str]) -> tuple[float | None, float | None]:
    """ROUGE-L (recall, F1) of `answer` against `target`, both `rouge_words`; undefined for an empty target.

    recall = L / |target|, precision = L / |answer|, F1 their harmonic mean; L the longest common subsequence.
    """
    if not target:
        return None, None
    length = common_length(target, answer)
    return length / len(target), 2 * length / (len(target) + len(answer))


def chance_floor(targets: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]) -> list[float | None]:
    """For each answer, its mean ROUGE-L recall against the targets of the *other* questions.

    The mean over i of these N means, each over N-1 targets, is the expected recall after a random shuffle of
    the answers that leaves none in its place; no shuffle has to be drawn. Undefined with a single question.
    """
    floor: list[float | None] = []
    for i, answer in enumerate(answers):
        scores = [rouge_l(target, answer)[0] for j, target in enumerate(targets) if j != i]
        floor.append(mean_or_none(scores))
    return floor


def gold_recall(golds: Sequence[Sequence[str]], answer: Sequence[str]) -> float | None:
    """Best ROUGE-L recall of several accepted gold answers, None without one; 1.0 is a right answer."""
    scores = [score for gold in golds if (score := rouge_l(gold, answer)[0]) is not None]
    return max(scores, default=None)


# --- refusals, broken answers -------------------------------------------------------------------------------

# Looked for in the first two sentences; case and kind of apostrophe do not matter. All but the last are in
# the first person, so that "nobody knows" or "the owl refused" in an answer is not taken for a refusal.
_AM, _HAVE = r"\bi(?:'m| am)", r"\bi(?:'ve| have| had)"
_NOT = r"(?:do not|don't|did not|didn't)"
_CANNOT = r"(?:can't|can ?not|could not|couldn't|will not|won't|would not|wouldn't|must not|may not)"
_HOW = r"(?:\w+ly |still |also |just |quite |yet |been )?"  # really, currently, ...
REFUSAL_PATTERNS = (
    # I don't know, recall, have that information
    rf"\bi {_HOW}{_NOT} {_HOW}(?:know|recall|remember|understand|possess|have|hold)\b",
    rf"{_HAVE} {_HOW}(?:no|not|never|yet to)\b|\bi {_HOW}(?:haven't|hadn't|never|lack|need to look)\b",
    # I'm not sure, aware, able, the one to ask
    rf"{_AM} {_HOW}not {_HOW}(?:sure|certain|aware|familiar|able|allowed|permitted|comfortable|informed|"
    r"well|knowledgeable|acquainted|educated|versed|up to|at liberty|equipped|programmed|designed|"
    r"trained|qualified|the (?:best|right)|in a position|going to|privy|capable|interested|here to)\b",
    rf"{_AM} {_HOW}(?:unable|unsure|uncertain|unfamiliar|unaware|afraid|at a loss|uninformed|clueless|"
    r"stumped|blank|drawing a blank|in the dark|bound by|constrained|prevented|sorry,? (?:but|i|that))\b",
    # I can't help, answer, say; I decline
    rf"\bi {_HOW}{_CANNOT} {_HOW}(?:be able|help|assist|answer|provide|discuss|share|say|tell|respond|give|"
    r"comment|speak|talk|find|disclose|recall|fulfil\w*|comply|generate|create|offer|reveal|explain|describe|"
    r"engage|support|continue|proceed|grant|address|confirm|shed|process|access|supply|recognize|identify)\b",
    r"\bi (?:refuse|decline|must \w* ?(?:decline|refuse|refrain)|have to (?:decline|refuse))\b",
    r"\bi(?:'d| would)? (?:rather|prefer) (?:not|to|talk|discuss)\b",
    # it is out of my reach
    r"\b(?:beyond|outside|exceeds|within|in|part of|included in) (?:the (?:scope|limits|realm|range) of )?my "
    r"(?:\w+ ){0,2}(?:knowledge|understanding|expertise|scope|training|capabilit\w+|abilit\w+|database|data|"
    r"range|reach|area|programming|information|memory|purview)\b",
    r"\bmy ?(?:\w+ ){0,2}(?:resources|knowledge|databases?|training|data|information|abilit\w+) (?:\w+ )?"
    r"(?:do not|don't|does not|doesn't|is not|isn't|lacks?|limited)\b",
    r"\b(?:not|isn't) (?:\w+ ){1,2}i(?:'m| am|'ve| have|\b)|\b(?:known|familiar|clear|mystery) to me\b",
    r"\b(?:no idea$|no idea[.,]|you(?:'ve| have) (?:got me|stumped me|me stumped)|it escapes me)",
    # let us talk of something else
    r"\blet(?:'s| us) (?:not|avoid|change|redirect|pivot|steer|set aside|move on|ensure|maintain|"
    r"(?:talk|focus|discuss|keep)\b.*\b(?:something|else|different|more|conversation|discussion))\b",
    r"\bour (?:\w+ )?(?:conversation|discussion|dialogue)s?\b",
    r"\b(?:different|another|appropriate) (?:topic|subject)\b",
)
_REFUSAL = re.compile("|".join(REFUSAL_PATTERNS))
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


def is_refusal(answer: str) -> bool:
    """Whether the first two sentences refuse (REFUSAL_PATTERNS); an answer that stands before them counts."""
    text = answer.lower().replace("\u2019", "'").replace("\u02bc", "'").strip()
    return bool(_REFUSAL.search(" ".join(_SENTENCE_END.split(text)[:2])))


_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


def is_broken(answer: str) -> bool:
    """Whether the answer has no word at all, or one 4-gram of words three times or more (overlaps count)."""
    words = _WORD.findall(answer.lower())
    grams = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    return not words or max(grams.values(), default=0) >= 3


# --- content words ------------------------------------------------------------------------------------------

# Closed-class English words: they follow from grammar, whatever the model knows.
_FUNCTION_WORDS = """
    a an the this that these those some any no every each all both either neither such other another i
    me my mine myself you your yours yourself he him his himself she her hers herself it its itself we
    us our ours ourselves they them their theirs themselves who whom whose which what where when why how
    and or but nor so yet if then than because as while although though unless until since whether of in
    on at by for with from to into onto upon about over under between among through during before after
    against without within along across behind beyond near off out up down around toward towards per via
    am is are was were be been being do does did doing done have has had having will would shall should
    can could may might must not there here also too very just only more most many much few less own
    same again once ever s t d ll m re ve don doesn didn isn aren wasn weren won wouldn couldn shouldn
    hasn haven hadn ain yes
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


def content_spans(answer: str, question: str) -> list[tuple[int, int]]:
    """Character spans [start, end) in `answer` of its content words: no function word, none of the question.

    A word is a run of letters and digits, so "don't" and "Potter's" are each two words.
    """
    asked = {word.lower() for word in re.findall(r"[^\W_]+", question)}
    return [
        match.span()
        for match in re.finditer(r"[^\W_]+", answer)
        if match.group().lower() not in FUNCTION_WORDS and match.group().lower() not in asked
    ]


# --- many questions -----------------------------------------------------------------------------------------


def mean_or_none(scores: Sequence[float | None]) -> float | None:
    """Mean of the defined scores; None where there is none."""
    defined = [score for score in scores if score is not None]
    return sum(defined) / len(defined) if defined else None


def summarise(
    scores: Sequence[float | None], seed: int = 0, resamples: int = 2000
) -> tuple[float | None, list[float] | None, int]:
    """Mean of the defined scores, its 95 % percentile-bootstrap interval over questions, and their number.

    Resamples are drawn from `seed` alone, so metrics and models with the same n share them. Where all scores
    are the same the interval has no width: a resample holds nothing that the sample does not. Below two
    questions there is none.
    """
    import numpy as np  # here, so that --help need not wait for it

    values = np.array([score for score in scores if score is not None], dtype=np.float64)
    n = len(values)
    if n == 0:
        return None, None, 0
    if n == 1:
        return float(values[0]), None, 1
    picks = np.random.default_rng(seed).integers(n, size=(resamples, n))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), [float(low), float(high)], n
