"""Porter's stemmer, as ROUGE with "stemmer on" uses it: the suffixes of English words, off in five steps.

`rouge-score` stems with NLTK's default variant, which departs from the paper in a few places, each marked
"NLTK" below; a test holds this file to it word by word.

References:
  Porter, "An algorithm for suffix stripping", Program 14(3), 1980.
"""

from __future__ import annotations

from collections.abc import Callable

# NLTK: words that the rules would get wrong.
IRREGULAR = {
    "sky": "sky",
    "skies": "sky",
    "dying": "die",
    "lying": "lie",
    "tying": "tie",
    "news": "news",
    "innings": "inning",
    "inning": "inning",
    "outings": "outing",
    "outing": "outing",
    "cannings": "canning",
    "canning": "canning",
    "howe": "howe",
    "proceed": "proceed",
    "exceed": "exceed",
    "succeed": "succeed",
}

# (suffix, replacement); in each step the first suffix that fits decides, whether or not its condition holds.
STEP_2 = (
    ("ational", "ate"),
    ("tional", "tion"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("izer", "ize"),
    ("bli", "ble"),  # the paper: abli -> able
    ("alli", "al"),
    ("entli", "ent"),
    ("eli", "e"),
    ("ousli", "ous"),
    ("ization", "ize"),
    ("ation", "ate"),
    ("ator", "ate"),
    ("alism", "al"),
    ("iveness", "ive"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("aliti", "al"),
    ("iviti", "ive"),
    ("biliti", "ble"),
    ("fulli", "ful"),  # NLTK
)
STEP_3 = (
    ("icate", "ic"),
    ("ative", ""),
    ("alize", "al"),
    ("iciti", "ic"),
    ("ical", "ic"),
    ("ful", ""),
    ("ness", ""),
)
STEP_4 = tuple(
    (suffix, "")
    for suffix in (
        *("al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment"),
        *("ent", "ion", "ou", "ism", "ate", "iti", "ous", "ive", "ize"),
    )
)


def forms(word: str) -> str:
    """The word as a string of c and v. A consonant is no vowel, and no y after a consonant."""
    pattern = ""
    for letter in word:
        is_vowel = letter in "aeiou" or (letter == "y" and pattern[-1:] == "c")
        pattern += "v" if is_vowel else "c"
    return pattern


def measure(stem: str) -> int:
    """Porter's m: how often a consonant follows a vowel in [C](VC)^m[V]."""
    return forms(stem).count("vc")


def ends_short(stem: str) -> bool:
    """Porter's *o: ends consonant-vowel-consonant, the last not w, x or y. NLTK: or is vowel-consonant."""
    return (forms(stem)[-3:] == "cvc" and stem[-1] not in "wxy") or forms(stem) == "vc"


def replace(word: str, rules: tuple[tuple[str, str], ...], condition: Callable[[str], bool]) -> str:
    """The first rule whose suffix fits, if the condition holds of what stands before; else no change."""
    for suffix, replacement in rules:
        if word.endswith(suffix):
            stem = word[: -len(suffix)]
            return stem + replacement if condition(stem) else word
    return word


def plural(word: str) -> str:
    """Step 1a: ponies -> poni, cats -> cat, caress -> caress. NLTK: dies -> die."""
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def past_or_gerund(word: str) -> str:
    """Step 1b: plastered -> plaster, hopping -> hop, filing -> file. NLTK: tied -> tie, carried -> carri."""
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        stem = word.removesuffix(suffix)
        if stem != word and "v" in forms(stem):
            return restore_end(stem)
    return word


def restore_end(stem: str) -> str:
    """What step 1b puts back: conflat -> conflate, hopp -> hop, fil -> file."""
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if len(stem) > 1 and stem[-1] == stem[-2] and forms(stem)[-1] == "c":
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if measure(stem) == 1 and ends_short(stem) else stem


def step_2(word: str) -> str:
    """relational -> relate, radically -> radic. NLTK: again after alli -> al; logi -> log by m of `…l`."""
    if word.endswith("alli") and measure(word[:-4]) > 0:
        return step_2(word[:-2])
    if word.endswith("logi"):
        return word[:-1] if measure(word[:-3]) > 0 else word
    return replace(word, STEP_2, lambda stem: measure(stem) > 0)


def step_4(word: str) -> str:
    """revival -> reviv, adoption -> adopt (ion goes only after s or t)."""

    def is_long(stem: str) -> bool:
        return measure(stem) > 1 and (not word.endswith("ion") or stem[-1] in "st")

    return replace(word, STEP_4, is_long)


def step_5(word: str) -> str:
    """probate -> probat, rate -> rate; then controll -> control."""
    if word.endswith("e"):
        m = measure(word[:-1])
        if m > 1 or (m == 1 and not ends_short(word[:-1])):
            word = word[:-1]
    return word[:-1] if word.endswith("ll") and measure(word[:-1]) > 1 else word


def stem(word: str) -> str:
    """The stem of one lower-case word; words of one or two letters stay."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) <= 2:
        return word
    word = past_or_gerund(plural(word))
    if word.endswith("y") and len(word) > 2 and forms(word[:-1])[-1] == "c":  # step 1c as NLTK has it
        word = word[:-1] + "i"
    return step_5(step_4(replace(step_2(word), STEP_3, lambda before: measure(before) > 0)))
