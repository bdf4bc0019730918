"""Models, adapters and machines that cannot be used: exit code 2, one line on stderr; nothing lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from duet_mlx import evaluate as ev
from duet_mlx.files import only_run_in
from tests.small_disk import small_disk
from tests.tiny_model import contents, tiny_model

# --- the model ---------------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(model, tmp_path) -> Path:
    """A copy of the model that may be spoilt."""
    return Path(shutil.copytree(model, tmp_path / "spoilt"))


def test_a_model_that_is_not_there(refused, quick, tmp_path):
    refused("train", *quick, "--model", tmp_path / "none", says=("--model", "none", "no such folder"))
    refused("train", *quick, "--model", tmp_path / "none.gguf", says=("--model", "none.gguf", "no such file"))
    refused("train", *quick, "--model", __file__, says=("--model", "plain file"))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_folder_that_lacks_a_file(refused, quick, spoilt, file):
    (spoilt / file).unlink()
    said = refused("train", *quick, "--model", spoilt, says=("--model", str(spoilt)))
    assert file.split(".")[0] in said


@pytest.mark.parametrize("left", [0, 5, 1000, 0.5, 0.99], ids=str)
def test_broken_safetensors(refused, quick, spoilt, left):
    file = spoilt / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left if left > 1 else left * len(whole))])
    refused("train", *quick, "--model", spoilt, says=("--model", str(spoilt)))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"hidden_size": 128}, ()),
        ({"num_hidden_layers": 3}, ("layers.2",)),
        ({"model_type": "lama"}, ("lama",)),
        ({"model_type": None}, ()),
        ({"max_position_embeddings": None}, ("max_position_embeddings",)),
    ],
    ids=lambda value: str(value),
)
def test_a_config_that_is_not_of_these_weights(refused, quick, spoilt, change, says):
    file = spoilt / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    refused("train", *quick, "--model", spoilt, says=("--model", str(spoilt), *says))


def test_a_config_that_is_not_json(refused, quick, spoilt):
    (spoilt / "config.json").write_text('{"model_type": ')
    refused("train", *quick, "--model", spoilt, says=("--model", str(spoilt)))


# --- adapters ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def other_model(tmp_path_factory) -> Path:
    """A model of another width."""
    return tiny_model(tmp_path_factory.mktemp("models") / "other", hidden_size=128)


@pytest.fixture(scope="session")
def twin_model(tmp_path_factory) -> Path:
    """A model of the very same shapes, with other weights."""
    return tiny_model(tmp_path_factory.mktemp("models") / "twin", bits=4, seed=1)


def test_evaluating_an_adapter_of_another_model(refused, data, trained, other_model, twin_model, tmp_path):
    flags = [*data, "--adapter-path", trained, "--out", tmp_path / "out", "--max-tokens", 2]
    refused("evaluate", "--model", other_model, *flags, says=("--adapter-path", str(trained), "model"))
    said = refused("evaluate", "--model", twin_model, *flags, says=("--adapter-path", "another model", "tiny"))
    assert "twin" in said
    assert not (tmp_path / "out" / "results.json").exists()


def test_evaluating_a_folder_that_is_no_adapter(refused, model, data, trained, tmp_path):
    flags = ["--model", model, *data, "--adapter-path", trained, "--out", tmp_path / "out", "--max-tokens", 2]
    (trained / "adapters.safetensors").write_bytes(b"\x08" + bytes(20))
    refused("evaluate", *flags, says=("--adapter-path", str(trained)))
    (trained / "adapters.safetensors").unlink()
    refused("evaluate", *flags, says=("--adapter-path", "adapters.safetensors"))
    (trained / "adapter_config.json").write_text("{")
    refused("evaluate", *flags, says=("--adapter-path", "adapter"))
    (trained / "adapter_config.json").unlink()
    refused("evaluate", *flags, says=("--adapter-path", "adapter_config.json"))


def test_resuming_an_adapter_of_another_model(refused, quick, trained_once, other_model, twin_model, tmp_path):
    file = trained_once / "adapters.safetensors"
    before = contents(trained_once)
    flags = [*quick, "--iters", 5, "--resume-adapter-file", file]
    for other in (other_model, twin_model):
        refused("train", *flags, "--model", other, says=(str(file), "another model", str(other)))
    same_name = Path(shutil.copytree(other_model, tmp_path / "tiny"))  # as if the model's folder had been replaced
    refused("train", *flags, "--model", same_name, says=(str(file), "does not fit"))
    assert contents(trained_once) == before


def test_resuming_what_cannot_be_resumed(refused, quick, trained, tmp_path):
    aside = tmp_path / "aside"
    trained.rename(aside)
    flags = [*quick, "--resume-adapter-file"]
    refused("train", *flags, aside / "none.safetensors", says=("--resume-adapter-file", "none.safetensors"))
    shutil.copy(aside / "adapters.safetensors", aside / "optimizer.safetensors")  # holds no step
    refused("train", *flags, aside / "adapters.safetensors", says=("--resume-adapter-file", "optimizer"))
    (aside / "optimizer.safetensors").unlink()
    refused("train", *flags, aside / "adapters.safetensors", says=("--resume-adapter-file", "optimizer"))
    (aside / "adapters.safetensors").write_bytes(b"broken")
    refused("train", *flags, aside / "adapters.safetensors", says=("--resume-adapter-file",))


def test_an_adapter_folder_that_is_not_empty(refused, quick, trained):
    before = contents(trained)
    refused("train", *quick, says=(str(trained), "not empty", "--overwrite", "--resume-adapter-file"))
    assert contents(trained) == before


def test_a_folder_of_other_things_is_no_adapter_to_resume(refused, quick, tmp_path):
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "thesis.txt").write_text("all of it")
    said = refused("train", *quick, says=("not empty", "thesis.txt", "--overwrite"))
    assert "--resume" not in said


def test_an_adapter_path_that_is_a_file(refused, quick, tmp_path):
    (tmp_path / "adapters").write_text("mine")
    refused("train", *quick, says=("--adapter-path", "is a file"))
    refused("train", *quick, "--adapter-path", tmp_path / "adapters" / "below", says=("--adapter-path", "below"))


def test_results_are_not_replaced_unasked(refused, model, data, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    refused("evaluate", "--model", model, *data, "--out", tmp_path, says=("--out", "results.json", "--overwrite"))


def test_a_second_evaluation_into_a_folder_is_refused_as_long_as_the_first_goes_on(refused, model, data, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    for flags in ([], ["--overwrite"]):
        with only_run_in(folder):
            says = (f"--out {folder}", "another run is writing there")
            refused("evaluate", "--model", model, *data, *flags, "--out", folder, says=says)
        assert contents(folder) == {}


def test_results_that_came_while_the_questions_were_read_are_not_replaced(refused, model, data, tmp_path, monkeypatch):
    load = ev.load_benchmarks
    monkeypatch.setattr(ev, "load_benchmarks", lambda *a: (tmp_path / "results.json").write_text("{}") and load(*a))
    refused("evaluate", "--model", model, *data, "--out", tmp_path, says=("--out", "results.json", "--overwrite"))
    assert contents(tmp_path) == {"results.json": b"{}"}


# --- the machine -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(refused, quick, tmp_path):
    tmp_path.chmod(0o555)
    try:
        refused("train", *quick, says=("--adapter-path", "Permission denied"))
    finally:
        tmp_path.chmod(0o755)


def test_no_permission_as_the_system_says_it(refused, quick, monkeypatch):
    def mkdir(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    refused("train", *quick, says=("--adapter-path", "adapters", "Permission denied"))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a folder where even root may not write")
def test_a_folder_that_nobody_may_write_to(refused, quick):
    refused("train", *quick, "--adapter-path", "/proc/self", "--overwrite", says=("--adapter-path /proc/self",))


def test_no_room_for_the_targets(refused, quick, tmp_path):
    with small_disk(1000):
        refused("train", *quick, says=("targets.safetensors", "cannot"))
    assert contents(tmp_path / "adapters") == {}


@pytest.mark.parametrize("room", [100, 20_000], ids=["config", "adapter"])
def test_no_room_for_the_adapter(refused, quick, trained, room):
    before = contents(trained)
    with small_disk(room):
        refused("train", *quick, "--overwrite", says=(str(trained), "cannot be written"))
    after = contents(trained)
    for file in ("adapters.safetensors", "adapter_config.json", "optimizer.safetensors", "targets.safetensors"):
        assert after[file] == before[file]
    assert not [name for name in after if "partial" in name]


def test_no_room_for_what_the_lower_layers_give(refused, command, quick, trained):
    """Only the targets' file is as it should be by then; with room for the rest the run is done, and leaves no more."""
    before, flags = contents(trained), [*quick, "--overwrite", "--num-layers", 1]
    with small_disk(20_000):
        refused("train", *flags, says=(f"{trained}: ", "layers that are not trained", "--num-layers -1"))
    assert contents(trained) == before
    assert command("train", *flags).code == 0
    assert contents(trained).keys() == before.keys()


def test_no_room_for_the_targets_on_a_second_run(refused, quick, trained):
    before = contents(trained)
    with small_disk(1000):
        refused("train", *quick, "--overwrite", "--top-k", 6, says=("targets.safetensors", "cannot"))
    assert contents(trained) == before


def test_a_loss_that_is_not_finite_leaves_the_last_good_adapter(refused, quick, tmp_path):
    import mlx.core as mx

    said = refused("train", *quick, "--learning-rate", "1e30", says=("not finite", "--learning-rate", "is kept in"))
    assert "step 2:" in said and "adapter of step 0" in said  # the first update spoilt it, the second step showed it
    weights = mx.load(str(tmp_path / "adapters" / "adapters.safetensors"))
    assert weights and all(mx.isfinite(a).all().item() and mx.abs(a).max().item() < 1 for a in weights.values())
    assert json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["step"] == 0
    state = mx.load(str(tmp_path / "adapters" / "optimizer.safetensors"))
    assert all(mx.isfinite(a).all().item() for a in state.values())


def test_after_a_loss_that_is_not_finite_a_lower_rate_goes_on(command, quick, tmp_path):
    assert command("train", *quick, "--learning-rate", "1e30").code == 2
    file = tmp_path / "adapters" / "adapters.safetensors"
    ended = command("train", *quick, "--learning-rate", "1e-4", "--resume-adapter-file", file)
    assert ended.code == 0 and "going on from step 0" in ended.out, ended
