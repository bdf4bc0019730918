"""A benchmark's rows put to a model: what is asked, and that every figure is that of a bare call of the model."""

import mlx.core as mx
import numpy as np
import pytest

from duet_mlx.benchmark_run import judge
from duet_mlx.context import Context, render
from duet_mlx.errors import ModelError
from duet_mlx.fluency import without_adapter
from duet_mlx.generate import greedy, stop_ids
from duet_mlx.items import Item
from duet_mlx.model import add_lora
from duet_mlx.probe import ask, end_of_turn, letter_ids, log_probs, prompt_of
from tests.equivalence.tiny import llama, plain_logits, tokenizer


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def words():
    return tokenizer()


def softmax_logs(logits):
    logits = logits.astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def item(kind, question, **fields):
    return Item("i", "forget", kind, question, **fields)


SHOTS = (item("knowmem", "Who?", answers=("Me",)), item("knowmem", "When?", answers=("Now", "Then")))
OPTIONS = (item("choice", "Up?", choices=("no", "yes"), correct=1, subject="a_b"),)


def test_prompts_are_those_of_the_benchmarks(words):
    def text(one, context=None, system=""):
        return words.decode(prompt_of(words, one, context, system))

    context = Context("c", "Forget all.", (("Hi?", "Ho"),))
    assert prompt_of(words, item("qa", "Who?"), context, "Be brief.") == render(words, "Who?", context, "Be brief.")
    knowmem = item("knowmem", "Where?", shots=SHOTS)
    asked = "Question: Who?\nAnswer: Me\n\nQuestion: When?\nAnswer: Now\n\nQuestion: Where?\nAnswer: "
    assert text(knowmem) == asked
    assert text(knowmem, context, "Be brief.") == f"Forget all.\n\nBe brief.\n\nQuestion: Hi?\nAnswer: Ho\n\n{asked}"
    assert text(item("verbmem", "Once upon")) == text(item("privleak", "Once upon")) == "Once upon"


def test_a_multiple_choice_prompt_names_the_subject_and_ends_in_answer():
    class Plain:
        chat_template, bos_token_id, eos_token_id = None, None, None

        def encode(self, text, add_special_tokens):
            return list(text.encode())

    one = item("choice", "Down?", choices=("left", "right"), correct=0, subject="a_b", shots=OPTIONS)
    assert bytes(prompt_of(Plain(), one)).decode() == (
        "The following are multiple choice questions (with answers) about a b.\n\n"
        "Up?\nA. no\nB. yes\nAnswer: B\n\nDown?\nA. left\nB. right\nAnswer:"
    )


def test_log_probs_and_first_choices_are_those_of_a_bare_call(model):
    prompts = [[5, 6, 7], [5, 6, 8, 9], [5, 3]]
    texts = [[4, 5], list(range(1, 20)), []]
    expected = [[p[len(q) - 1 + t] for t in range(len(x))] for q, x, p in zip(
        prompts, texts, (softmax_logs(plain_logits(model, q + x)) for q, x in zip(prompts, texts, strict=True)),
        strict=True)]  # fmt: skip
    for (values, hits), rows, text in zip(log_probs(model, prompts, texts), expected, texts, strict=True):
        assert values == pytest.approx([row[token] for row, token in zip(rows, text, strict=True)], abs=1e-4)
        assert hits == [row.argmax() == token for row, token in zip(rows, text, strict=True)]


def test_a_reply_is_the_greedy_answer_and_the_probabilities_of_all_given_answers(model, words):
    items = [
        item("qa", "Who?", answers=("Me", "I"), paraphrased="It is me", perturbed=("You", "They")),
        item("qa", "Where is it?", answers=("Here",)),
        item("qa", "Why?"),
    ]
    replies = ask(model, words, items, max_tokens=8)
    prompts = [render(words, one.question) for one in items]
    assert [reply.ids for reply in replies] == greedy(model, prompts, 8, stop_ids(words))
    end = [words.eos_token_id]
    for reply, prompt, texts in (
        ([replies[0].reference, replies[0].paraphrased, *replies[0].perturbed], prompts[0],
         ("Me", "It is me", "You", "They")),
        ([replies[1].reference], prompts[1], ("Here",)),
    ):  # fmt: skip
        for values, text in zip(reply, texts, strict=True):
            tokens = words.encode(text, add_special_tokens=False) + end
            logs = softmax_logs(plain_logits(model, prompt + tokens))[len(prompt) - 1 :]
            assert values == pytest.approx([row[token] for row, token in zip(logs, tokens, strict=False)], abs=1e-4)
    assert len(replies[0].hits) == len("Me") + 1
    assert replies[2].reference == [] and replies[2].perturbed == []


@pytest.mark.parametrize(("written", "end"), [("", 0), ("z", 26), ("y.", 25), ("ab", 0)])
def test_an_answer_ends_as_the_template_ends_it(written, end):
    """Of two tokens that stop decoding, 0 is the EOS; 'z' (26) and 'y' (25) stand for Gemma's end of turn."""
    words = tokenizer()
    words.eos_token_ids = {0, 25, 26}
    words._tokenizer.chat_template = words.chat_template.replace("\n{% endfor", written + "\n{% endfor")
    assert end_of_turn(words) == [end]


def test_a_qa_answer_has_room_for_its_longest_reference(model, words):
    long = item("qa", "Who?", answers=("x", "y" * 19))
    (reply,) = ask(model, words, [long], max_tokens=2)
    assert len(reply.ids) == 30 or reply.ids == greedy(model, [render(words, "Who?")], 30, stop_ids(words))[0]


def test_batches_and_shared_shots_change_nothing(model, words):
    items = [item("knowmem", f"{q}?", answers=("a",), shots=SHOTS) for q in ("Who", "Where is", "Why")]
    items += [item("knowmem", "Who?", answers=("a",)), item("verbmem", "Once", answers=("a",))]
    together = ask(model, words, items)
    assert together == [ask(model, words, [one], batch_size=1)[0] for one in items]
    assert all(len(reply.ids) <= 32 for reply in together[:4])


def test_a_text_for_privleak_is_scored_from_its_second_token_on(model, words):
    (reply,) = ask(model, words, [item("privleak", "Once upon")])
    tokens = words.encode("Once upon", add_special_tokens=False)
    logs = softmax_logs(plain_logits(model, tokens))
    assert reply.text == pytest.approx([logs[t, token] for t, token in enumerate(tokens[1:])], abs=1e-4)
    assert ask(model, words, [item("privleak", "O")])[0].text == []


class Spaced:
    """The tiny tokenizer, with one token for a space and a letter: here the letter alone."""

    def __init__(self, words):
        self.words = words
        self.chat_template, self.bos_token_id, self.eos_token_id = None, None, 0
        self.eos_token_ids = {0}

    def encode(self, text, add_special_tokens=False):
        return self.words.encode(text.replace("Answer: ", "Answer:"), add_special_tokens=False)


def test_the_option_taken_is_the_letter_with_the_largest_logit(model, words):
    spaced = Spaced(words)
    letters = [words.encode(letter, add_special_tokens=False)[0] for letter in "ABCD"]
    assert letter_ids(spaced, 4) == letters
    items = [
        item("choice", question, choices=choices, correct=0, subject="a_b", shots=shots)
        for question in ("Who", "Where is it", "Why")
        for choices in (("x", "y"), ("x", "y", "z", "x"))
        for shots in ((), OPTIONS)
    ]
    for one, reply in zip(items, ask(model, spaced, items), strict=True):
        logits = plain_logits(model, prompt_of(spaced, one))[-1]
        assert reply.choice == int(np.argmax(logits[letters[: len(one.choices)]]))


def test_letters_of_several_tokens_are_an_error(model, words):
    with pytest.raises(ModelError, match="one token of each letter"):
        ask(model, words, [item("choice", "Who", choices=("x", "y"), correct=0)])


def test_the_base_judges_an_answer_with_the_adapter_off_and_on_again_afterwards(words):
    model = llama()
    prompt, said = render(words, "Who?"), [4, 7, 9]
    before = plain_logits(model, prompt + said)
    add_lora(model, -1, rank=2, scale=4.0, dropout=0.0, keys=["self_attn.q_proj", "mlp.up_proj"])
    for _, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape)
    adapted = plain_logits(model, prompt + said)
    assert np.abs(adapted - before).max() > 0.1
    with without_adapter(model):
        assert np.array_equal(plain_logits(model, prompt + said), before)
    assert np.array_equal(plain_logits(model, prompt + said), adapted)

    from duet_mlx.probe import Reply

    replies = [Reply(ids=said), Reply()]
    judge(model, words, [item("qa", "Who?"), item("qa", "Why?")], replies)
    logs = softmax_logs(before)[len(prompt) - 1 :]
    assert replies[0].surprise == pytest.approx(-np.mean([logs[t, token] for t, token in enumerate(said)]), abs=1e-4)
    assert replies[1].surprise is None
