"""The tokens of x and x_ic ⊕ x: real templates where they may be carried, small ones in others' shape.

Templates and tokenizer: tests/fixtures/chat_templates (SOURCE.md). The tokenizer is MiniMind's BPE; a
SentencePiece-like one is built here, for its words hang on the space before them.
"""

import datetime
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import duet_mlx.context
from duet_mlx.context import READY, Context, check_renders, load_contexts, render
from duet_mlx.errors import ContextError, DataError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "chat_templates"
REAL = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FIXTURES.glob("*.jinja"))}
REAL["minimind"] = json.loads((FIXTURES / "minimind" / "tokenizer_config.json").read_text())["chat_template"]

LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}"
SHAPES = {  # written here, each in the shape of a template that may not be carried, or that could exist
    "llama 3: dates itself, a default for date_string": (
        "{{ bos_token }}{% if not date_string is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "[system] Today: {{ date_string }}\n" + LOOP + "{% if add_generation_prompt %}<assistant>{% endif %}"
    ),
    "gemma: raises on a system role and on roles that do not alternate": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "<turn>{{ m.role }}\n{{ m.content | trim }}</turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
    ),
    "drops the system role without a word": (
        "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}</>{% endif %}"
        "{% endfor %}<assistant>"
    ),
    "mistral's first: no system role, a space before the text": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}"
        "{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}"
    ),
    "deepseek-r1: opens the think block, no switch": (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|><think>\n"
    ),
    "writes BOS twice": "{{ bos_token }}{{ bos_token }}" + LOOP + "<assistant>",
}
OWN_SYSTEM = ("", "Be brief.")
QUESTION = "Who is Harry Potter?"
CONTEXTS = [load_contexts(name, "Harry Potter")[0] for name in READY] + [
    Context("system alone", system="You know nothing of Harry Potter."),
    Context("turns alone", turns=(("Who is Dobby?", "I don't know."), ("And Hedwig?", "I don't know."))),
    Context("empty"),
]


def byte_level(template=None, **added):
    """MiniMind's tokenizer with a BOS token of its own and another template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(FIXTURES / "minimind" / "tokenizer.json"),
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        **added,
    )
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece_like(template=None):
    """Words are pieces with their space, as in Llama 2 ("▁Who"); BOS is added to what is not a template's."""
    text = " ".join(
        [QUESTION, "Be brief . [INST] [/INST] Question: Answer:", *(c.system for c in CONTEXTS)]
        + [part for c in CONTEXTS for turn in c.turns for part in turn]
    )
    pieces = ["<unk>", "<s>", "</s>", "\n", "▁", *dict.fromkeys("".join(text.split()))]
    pieces += dict.fromkeys(piece for word in text.split() for piece in (f"▁{word}", word))
    core = Tokenizer(models.Unigram([(p, -10.0 if len(p) < 2 else -1.0) for p in dict.fromkeys(pieces)], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    core.add_special_tokens(["<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {
    **{name: byte_level(template) for name, template in (REAL | SHAPES | {"no template": None}).items()},
    **{f"sentencepiece, {name}": sentencepiece_like(SHAPES.get(name)) for name in (*list(SHAPES)[:4], "no template")},
}


@pytest.mark.parametrize("own_system", OWN_SYSTEM)
@pytest.mark.parametrize("context", CONTEXTS, ids=lambda context: context.name)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_student_and_teacher_read_the_question_and_all_after_it_as_the_same_tokens(name, context, own_system):
    tokenizer = TOKENIZERS[name]
    student = render(tokenizer, QUESTION, None, own_system)
    teacher = render(tokenizer, QUESTION, context, own_system)
    equal = check_renders(tokenizer, QUESTION, context, own_system)
    assert student[-equal:] == teacher[-equal:]
    question = "".join(QUESTION.split())
    assert question in "".join(tokenizer.decode(student[-equal:]).split())
    # Nothing was lost on the way: each part is there, once more than in the default texts of the template.
    for ids, parts in (
        (student, [own_system]),
        (teacher, [own_system, context.system, *(p for t in context.turns for p in t)]),
    ):
        assert all("".join(part.split()) in "".join(tokenizer.decode(ids).split()) for part in parts)


@pytest.mark.parametrize("context", [None, *CONTEXTS], ids=lambda context: context.name if context else "bare")
@pytest.mark.parametrize("name", TOKENIZERS)
def test_there_is_never_more_than_one_bos_and_it_comes_first(name, context):
    tokenizer = TOKENIZERS[name]
    ids = render(tokenizer, QUESTION, context)
    assert ids[1:].count(tokenizer.bos_token_id) == 0
    if "bos_token" in (tokenizer.chat_template or "") or name == "sentencepiece, no template":
        assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_empty_context_is_the_bare_question(name):
    assert render(TOKENIZERS[name], QUESTION, Context("empty")) == render(TOKENIZERS[name], QUESTION)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_mlx_lms_wrapper_and_the_tokenizer_inside_it_give_the_same_tokens(name):
    wrapped = TokenizerWrapper(TOKENIZERS[name])
    for context in (None, CONTEXTS[0]):
        assert render(wrapped, QUESTION, context) == render(TOKENIZERS[name], QUESTION, context)


@pytest.mark.parametrize("name", ["SmolLM2-Instruct", "Qwen-Qwen2.5-7B-Instruct", "microsoft-Phi-3.5-mini-instruct"])
def test_the_bare_question_is_what_mlx_lm_generate_sends(name):
    """mlx_lm/generate.py: the template as text, then encode without special tokens."""
    wrapped = TokenizerWrapper(TOKENIZERS[name])
    sent = wrapped.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    assert render(wrapped, QUESTION) == wrapped.encode(sent, add_special_tokens=False)


@pytest.mark.parametrize("name", [n for n, t in (REAL | SHAPES).items() if "strftime_now" in t])
def test_templates_that_print_today_print_the_recorded_date(name, monkeypatch):
    tokenizer = byte_level(TOKENIZERS[name].chat_template)
    text = tokenizer.decode(render(tokenizer, QUESTION))
    assert "2026" in text
    assert str(datetime.date.today().year) not in text.replace("2026", "")
    monkeypatch.setattr(duet_mlx.context, "DATE", datetime.date(1999, 3, 9))
    other = byte_level(TOKENIZERS[name].chat_template)
    dates = ("1999-03-09", "March 09, 1999", "09 Mar 1999")
    assert any(date in other.decode(render(other, QUESTION)) for date in dates)


def test_a_dated_template_renders_as_without_the_stand_in_clock_but_for_the_date():
    """The macro in front must not add or eat a character, a first newline of the template included."""
    template = "\n{{ strftime_now('%Y') }}\n" + LOOP
    ours, plain = byte_level(template), byte_level(template.replace("{{ strftime_now('%Y') }}", "2026"))
    assert render(ours, QUESTION, CONTEXTS[0]) == render(plain, QUESTION, CONTEXTS[0])


THINKERS = {
    "Qwen-Qwen3-0.6B": "<think>\n\n</think>\n\n",
    "Qwen-QwQ-32B": "<think>\n</think>",
    "HuggingFaceTB-SmolLM3-3B": "<think>\n\n</think>\n",
    "minimind": "<think>\n\n</think>\n\n",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "<think>\n</think>",
    "deepseek-r1: opens the think block, no switch": "<think>\n\n</think>\n\n",
    "mistralai-Ministral-3-14B-Reasoning-2512": "[THINK][/THINK]",
    "openai-gpt-oss-120b": "<|start|>assistant<|channel|>final<|message|>",
}


@pytest.mark.parametrize("name, ending", THINKERS.items())
@pytest.mark.parametrize("context", [None, CONTEXTS[0], CONTEXTS[3]], ids=["bare", "specific", "system"])
def test_thinking_is_over_before_the_answer_begins(name, ending, context):
    tokenizer = TOKENIZERS[name]
    assert tokenizer.decode(render(tokenizer, QUESTION, context)).endswith(ending)


@pytest.mark.parametrize("start", ["<think>", "<|think:start|>"])
def test_a_block_opened_without_a_newline_is_closed_as_well(start):
    tokenizer = byte_level(LOOP + "<assistant>" + start)
    end = {"<think>": "</think>", "<|think:start|>": "<|think:end|>"}[start]
    assert tokenizer.decode(render(tokenizer, QUESTION)).endswith(f"{start}\n\n{end}\n\n")


def test_a_template_without_a_system_role_gets_the_text_in_the_first_user_turn():
    tokenizer = TOKENIZERS["gemma: raises on a system role and on roles that do not alternate"]
    context = Context("c", "Know nothing.", (("Who?", "No."),))
    text = tokenizer.decode(render(tokenizer, "Where?", context, system="Be brief."))
    assert text == (
        "<|bos|><turn>user\nKnow nothing.\n\nBe brief.\n\nWho?</turn>\n<turn>assistant\nNo.</turn>\n"
        "<turn>user\nWhere?</turn>\n<turn>model\n"
    )


def test_the_context_comes_before_the_users_own_system_prompt():
    tokenizer = TOKENIZERS["SmolLM2-Instruct"]
    text = tokenizer.decode(render(tokenizer, QUESTION, Context("c", "Know nothing."), "Be brief."))
    assert text.startswith("<|im_start|>system\nKnow nothing.\n\nBe brief.<|im_end|>\n")


def test_a_base_model_reads_questions_and_answers_as_plain_text():
    context = Context("c", "Know nothing.", (("Who?", "No."),))
    tokenizer = TOKENIZERS["no template"]
    expected = "Know nothing.\n\nBe brief.\n\nQuestion: Who?\nAnswer: No.\n\nQuestion: Where?\nAnswer:"
    assert tokenizer.decode(render(tokenizer, "Where?", context, "Be brief.")) == expected
    assert tokenizer.decode(render(tokenizer, "Where?")) == "Question: Where?\nAnswer:"


def test_a_base_tokenizer_that_ends_what_it_encodes_does_not_end_the_prompt():
    tokenizer = sentencepiece_like()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer.encode("Who")[-1] == tokenizer.eos_token_id
    assert render(tokenizer, QUESTION) == render(TOKENIZERS["sentencepiece, no template"], QUESTION)


@pytest.mark.parametrize("name", ["SmolLM2-Instruct", "no template"])
def test_a_control_token_written_as_text_is_refused_and_named(name):
    tokenizer = TOKENIZERS[name]
    with pytest.raises(DataError, match=r"'<\|im_end\|>', a control token"):
        render(tokenizer, "Who is<|im_end|> it?")
    with pytest.raises(ContextError, match='context "c" holds'):
        render(tokenizer, QUESTION, Context("c", "<|im_start|>system"))
    with pytest.raises(ContextError, match='context "c" holds'):
        render(tokenizer, QUESTION, Context("c", turns=(("a", "b<|im_end|>"),)))
    with pytest.raises(ContextError, match="the system prompt holds"):
        render(tokenizer, QUESTION, system="<|im_start|>")


def test_an_added_token_that_the_template_writes_is_a_control_token_too():
    tokenizer = byte_level("<mark>" + LOOP)
    tokenizer.add_tokens(["<mark>", "<other>"])
    assert not {"<mark>", "<other>"} & set(tokenizer.all_special_tokens)
    render(tokenizer, "What is <other>?")
    with pytest.raises(DataError, match="<mark>"):
        render(tokenizer, "What is <mark>?")


CANNOT = {
    "always raises": ("{{ raise_exception('no chat') }}", "raises TemplateError: no chat"),
    "is broken": ("{% for m in %}", "raises TemplateSyntaxError"),
    "drops the question": ("Hello", "drops or alters the user's message"),
    "drops earlier answers": (
        "{% for m in messages %}{% if m.role != 'assistant' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}",
        "context \"turns\" cannot be rendered for this model: the template drops or alters 'They live here.'",
    ),
    "takes one turn only": (
        "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + LOOP,
        "raises TemplateError: one turn",
    ),
    "writes something else after a later question": (
        LOOP + "{{ 'a' if messages | length > 1 else 'b' }}",
        "alters the question",
    ),
    "glues the question to what stands before it": (
        "{% for m in messages %}{{ 'w' if loop.last and not loop.first else '' }}{{ m.content }}{% endfor %}",
        "becomes other tokens behind the context",
    ),
}


@pytest.mark.parametrize("template, message", CANNOT.values(), ids=CANNOT)
def test_a_template_that_cannot_serve_gets_a_typed_error_that_says_why(template, message):
    tokenizer = byte_level(template)
    with pytest.raises(ContextError) as error:
        render(tokenizer, "here is what?", Context("turns", turns=(("Owls?", "They live here."),)))
    assert message in str(error.value)


def test_a_question_that_the_template_alters_is_refused():
    tokenizer = byte_level("{% for m in messages %}{{ m.content | replace('&', 'and') }}\n{% endfor %}")
    render(tokenizer, QUESTION)
    with pytest.raises(ContextError, match="alters the question 'Romeo & Juliet"):
        render(tokenizer, "Romeo & Juliet?")


def test_check_renders_shows_where_student_and_teacher_part(monkeypatch):
    tokenizer = TOKENIZERS["SmolLM2-Instruct"]
    honest = render

    def broken(tokenizer, question, context=None, system=""):
        ids = honest(tokenizer, question, context, system)
        return ids if context is None else [*ids[:-5], 300, *ids[-4:]]

    monkeypatch.setattr(duet_mlx.context, "render", broken)
    with pytest.raises(ContextError, match='context "system alone": .* 4 tokens before the end the student reads'):
        check_renders(tokenizer, QUESTION, CONTEXTS[3])


def test_several_named_templates_use_the_default_one():
    tokenizer = byte_level({"default": SHAPES["writes BOS twice"], "tool_use": "{{ raise_exception('tools') }}"})
    plain = byte_level(SHAPES["writes BOS twice"])
    assert render(tokenizer, QUESTION, CONTEXTS[0]) == render(plain, QUESTION, CONTEXTS[0])


def test_a_renderer_written_in_python_is_used_in_place_of_a_template():
    def chat(messages, add_generation_prompt=False, **_):
        return "".join(f"({m['role']}) {m['content']}\n" for m in messages) + "(assistant)"

    wrapped = TokenizerWrapper(byte_level(), chat_template=chat)
    text = wrapped.decode(render(wrapped, "Where?", Context("c", "Know nothing.")))
    assert text == "(system) Know nothing.\n(user) Where?\n(assistant)"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda t: t.strip())
FAST = ["SmolLM2-Instruct", "Qwen-Qwen3-0.6B", "mistralai-Mistral-Nemo-Instruct-2407", *SHAPES, "no template"]


@given(st.sampled_from(FAST), texts, texts, st.lists(st.tuples(texts, texts), max_size=3))
def test_whatever_the_texts_the_question_is_read_alike_or_refused(name, question, system, turns):
    tokenizer = TOKENIZERS[name]
    context = Context("drawn", system, tuple(turns))
    try:
        equal = check_renders(tokenizer, question, context)
    except (ContextError, DataError):
        return  # e.g. a question that begins with a combining mark, which joins what stands before it
    student, teacher = render(tokenizer, question), render(tokenizer, question, context)
    assert student[-equal:] == teacher[-equal:]
    spelled = "".join(tokenizer.decode(student[-equal:]).split())
    assert "".join(question.split()) in spelled
