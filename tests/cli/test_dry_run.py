"""`train --dry-run`: what the run will take, or what to lower."""

from __future__ import annotations

import shutil

from duet_mlx import dry_run


def test_it_needs_no_weights_and_writes_nothing(command, quick, model, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    quick[quick.index("--model") + 1] = str(bare)
    ended = command("train", *quick, "--dry-run")
    assert ended.code == 0 and not ended.err, ended
    said = dict(line.split(maxsplit=1) for line in ended.out.splitlines())
    assert list(said) == ["model", "trained", "questions", "steps", "memory", "peak", "this"]
    assert said["questions"].startswith("14, 6 of them to forget") and said["steps"].startswith("4 of 4 questions")
    assert said["this"] == "fits"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare"]


def test_what_the_lower_layers_give_is_said_to_lie_on_the_disk(command, quick):
    ended = command("train", *quick, "--dry-run", "--num-layers", 1)
    (disk,) = [line for line in ended.out.splitlines() if line.startswith("disk ")]
    assert "while it trains" in disk and float(disk.split()[1]) > 0


def test_what_does_not_fit_is_refused_with_what_to_lower(refused, quick, monkeypatch):
    monkeypatch.setattr(dry_run, "machine_memory", lambda: (1_000_000, "a very small machine"))
    said = (" do not fit into 1.0 MB (a very small machine)", "--batch-size 2", "a smaller or more tightly")
    refused("train", *quick, "--dry-run", says=said)


def test_what_the_model_does_not_allow_is_refused_as_by_the_run(refused, quick):
    for flags, says in (
        (["--top-k", 99999], ("--top-k 99999", "1 to 320", "vocabulary")),
        (["--num-layers", 7], ("--num-layers 7", "the model has 2")),
        (["--lora-parameters", "keys=[q]"], ("lora_parameters keys", "'q'", "self_attn.q_proj")),
        (["--lora-parameters", "rank=999"], ("lora_parameters rank", "999", "above 128")),
    ):
        refused("train", *quick, *flags, "--dry-run", says=says)


def test_a_head_that_cannot_be_called_apart_is_noted_as_by_the_run(command, quick):
    ended = command("train", *quick, "--dry-run", "--lora-parameters", "keys=[model.embed_tokens]")
    assert ended.code == 0 and ended.out.endswith("this fits\n"), ended
    assert ended.out.startswith("note: full head instead of K rows (LoRA is asked for on model.embed_tokens)")


def test_a_folder_without_config_is_named(refused, quick, tmp_path):
    (tmp_path / "empty").mkdir()
    quick[quick.index("--model") + 1] = str(tmp_path / "empty")
    refused("train", *quick, "--dry-run", says=("empty", "no config.json"))


def test_this_machine_has_memory():
    has, what = dry_run.machine_memory()
    assert 1e8 < has < 1e14 and what
