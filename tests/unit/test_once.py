"""`train_once`: what is kept, what is set aside, what is gone on with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import pytest

from duet_mlx.errors import ConfigError
from duet_mlx.once import train_once
from duet_mlx.train import parse_settings
from tests.tiny_model import contents, tiny_data, tiny_model

QUICK = ["--iters", "4", "--batch-size", "4", "--top-k", "5", "--positions", "2", "--steps-per-eval", "0",
         "--save-every", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def settings_and_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("once")
    flags = ["--model", str(tiny_model(folder / "tiny")), *tiny_data(folder / "data"), *QUICK]
    settings = parse_settings("once", "Once.", [*flags, "--adapter-path", str(folder / "run")])
    train_once(settings)
    return settings, folder / "run"


@pytest.fixture
def there(settings_and_run, tmp_path):
    settings, run = settings_and_run
    return replace(settings, adapter_path=str(shutil.copytree(run, tmp_path / "run"))), tmp_path / "run"


def cut_off_at_2(folder):
    """As if the run had been stopped after two steps."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "step": 2}))
    state = str(folder / "optimizer.safetensors")
    arrays, meta = mx.load(state, return_metadata=True)
    mx.save_safetensors(state, arrays, {**meta, "step": "2"})


def adapter(folder):
    return (folder / "adapters.safetensors").read_bytes()


def test_an_adapter_of_the_same_settings_is_kept(there, capsys):
    settings, folder = there
    before = adapter(folder)
    train_once(replace(settings, steps_per_report=3))
    assert adapter(folder) == before and "nothing to train" in capsys.readouterr().out


def test_one_from_before_a_setting_was_there_is_kept_as_the_default_is_what_it_had(there, capsys):
    settings, folder = there
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["settings"]["method_parameters"], config["settings"]["max_grad_norm"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    train_once(settings)
    assert "nothing to train" in capsys.readouterr().out
    train_once(replace(settings, max_grad_norm=7.0))
    assert "settings or questions have changed" in capsys.readouterr().out


def test_a_setting_that_the_method_does_not_read_may_be_another(there, capsys):
    settings, folder = there
    train_once(replace(settings, answer_tokens=7, retain_loss="kl", refusals="nowhere.txt"))
    assert "nothing to train" in capsys.readouterr().out
    cut_off_at_2(folder)
    train_once(replace(settings, answer_tokens=8, recipe="paper"))
    assert "going on from step 2" in capsys.readouterr().out


def test_another_setting_sets_it_aside_with_all_its_bytes(there):
    settings, folder = there
    before = adapter(folder)
    train_once(replace(settings, learning_rate=1e-5))
    [aside] = folder.parent.glob("run-until-*")
    assert adapter(aside) == before != adapter(folder)


def test_one_that_was_cut_off_is_gone_on_with(there, capsys):
    settings, folder = there
    train_once(replace(settings, iters=6))
    said = capsys.readouterr().out
    assert "settings or questions have changed" in said  # another length is another schedule
    train_once(replace(settings, iters=4))
    cut_off_at_2(folder)
    train_once(replace(settings, iters=4))
    assert "going on from step 2" in capsys.readouterr().out


def test_two_that_are_set_aside_in_one_second_have_two_names(there, monkeypatch):
    settings, folder = there
    monkeypatch.setattr("duet_mlx.files.time.strftime", lambda form: "now")
    train_once(replace(settings, iters=6))
    train_once(replace(settings, iters=5))
    assert sorted(path.name for path in folder.parent.glob("run-until-*")) == ["run-until-now", "run-until-now-2"]


def test_a_last_save_that_was_cut_off_is_completed_before_it_counts(there, capsys):
    settings, folder = there
    whole = adapter(folder)
    (folder / "adapters.safetensors").rename(folder / ".partial.adapters.safetensors")
    shutil.copy(folder / "0000002_adapters.safetensors", folder / "adapters.safetensors")
    assert adapter(folder) != whole
    train_once(settings)
    assert adapter(folder) == whole and "nothing to train" in capsys.readouterr().out


def test_a_damaged_one_is_set_aside_and_trained_again(there):
    settings, folder = there
    whole = adapter(folder)
    (folder / "adapters.safetensors").write_bytes(whole[:1000])
    train_once(settings)
    [aside] = folder.parent.glob("run-until-*")
    assert adapter(folder) == whole and adapter(aside) == whole[:1000]


@pytest.mark.parametrize("odd", [{"settings": None}, {"settings": []}, {"step": None}])
def test_a_config_with_odd_entries_costs_no_traceback(there, odd):
    settings, folder = there
    before = adapter(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **odd}))
    train_once(settings)
    assert adapter(folder) == before  # the same settings: trained again, or kept


def test_a_dry_run_leaves_everything_as_it_is(there, capsys):
    settings, folder = there
    before = contents(folder.parent)
    train_once(replace(settings, iters=6, dry_run=True))
    assert contents(folder.parent) == before and "steps" in capsys.readouterr().out


def test_a_folder_of_other_things_is_refused(there):
    settings, folder = there
    (folder / "adapters.safetensors").unlink()
    before = contents(folder)
    with pytest.raises(ConfigError, match="not empty"):
        train_once(settings)
    assert contents(folder) == before


def test_where_the_program_was_started_nothing_is_set_aside(there, monkeypatch):
    settings, folder = there
    monkeypatch.chdir(folder)
    before = adapter(folder)
    with pytest.raises(ConfigError, match="can be renamed"):
        train_once(replace(settings, iters=6, adapter_path="."))
    assert adapter(folder) == before


def test_a_run_that_was_stopped_before_its_first_save_starts_again(there):
    settings, folder = there
    for file in folder.iterdir():
        if file.name != "train_log.jsonl":
            file.unlink()
    train_once(settings)
    assert (folder / "adapters.safetensors").is_file()
