"""Loading a model (hub id, MLX folder or .gguf) and putting LoRA on it, both through mlx-lm."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import dequantize_model, load
from mlx_lm.utils import load_model as load_weights
from mlx_lm.utils import load_tokenizer as load_words

from .errors import ModelError
from .gguf import convert_gguf
from .swiglu import replace_swiglu

# Files of a hub repository that a model needs (mlx-lm's own list); never its pickles.
HUB_FILES = [
    "*.json",
    "model*.safetensors",
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "*.txt",
    "*.jsonl",
    "*.jinja",
]
# A mixture's router decides which expert speaks: adapting it changes every token, so it is left alone.
ROUTERS = ("gate", "router", "shared_expert_gate")


def on_gpu() -> bool:
    """Whether MLX computes on a GPU (Metal or CUDA) here."""
    return mx.default_device().type == mx.DeviceType.gpu


def resolve_model(name: str, widened: bool | None = None, flag: str = "--model") -> Path:
    """The MLX folder of a hub id, a local folder or a .gguf file (converted once, beside itself; see `load_model`).

    Raises:
        ModelError: nothing there, a folder without config.json or weights, or the hub cannot give it.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{flag} {name}: no such file")
        return convert_gguf(path, widen=not on_gpu() if widened is None else widened)
    if not path.exists():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise ModelError(f"{flag} {name}: no such folder or .gguf file, and not a hub id (owner/name)")
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(name, allow_patterns=HUB_FILES))
        except Exception as error:  # the hub client raises many kinds, all of them the same to the user
            raise ModelError(
                f"{flag} {name}: no local folder of that name, and the hub did not give it "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). Check the name, "
                "the network, or log in for a gated model"
            ) from error
    if not path.is_dir():
        raise ModelError(f"{flag} {name}: expected an MLX folder, a .gguf file or a hub id, found a plain file")
    if not (path / "config.json").is_file():
        raise ModelError(f"{flag} {name}: no config.json in it, so not an MLX model folder")
    if not list(path.glob("model*.safetensors")):
        raise ModelError(f"{flag} {name}: no model*.safetensors in it, so no weights to load")
    return path


def load_model(
    name: str,
    adapter_path: str | Path | None = None,
    trust_remote_code: bool = False,
    widened: bool | None = None,
    flag: str = "--model",
) -> tuple[nn.Module, Any, Path]:
    """Load model and tokenizer, ready for the backend: on CPU the base is dequantized once, to float32.

    Args:
        name: hub id, MLX folder or .gguf.  adapter_path: an mlx-lm adapter folder to apply.
        widened: whether to dequantize; None leaves it to the backend.  flag: the one that names it, for messages.

    Returns:
        (model in eval mode, mlx-lm's TokenizerWrapper, the MLX folder).

    Raises:
        ModelError: as `resolve_model`, or broken weights, unknown architecture, an adapter that does not fit.
    """
    widened = not on_gpu() if widened is None else widened
    if not on_gpu():  # read at the first evaluation, which is soon
        # MLX walks a graph in breadth up to this width, then in depth, where all of a stream's work comes before the
        # next one's. A training step is as wide as it has gradients.
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1000000")
    folder = resolve_model(name, widened, flag)
    try:
        model, tokenizer = load(
            str(folder),
            tokenizer_config={"trust_remote_code": trust_remote_code},
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # two libraries and the model's own code may raise anything
        raise ModelError(f"{flag} {name}: cannot be loaded from {folder}: {_short(error)}") from error
    if widened:
        # MLX's quantized product is a scalar loop on CPU, and half floats are slower still; the numbers are the same.
        with mx.stream(mx.cpu):  # also where a GPU asks what a CPU would hold (`hash_elsewhere`)
            model = widen(dequantize_model(widen(model)))
    if not on_gpu():
        replace_swiglu(model)
    model.freeze()
    model.eval()
    if adapter_path is not None:
        apply_adapter(model, adapter_path)
    return model, tokenizer, folder


def load_tokenizer(name: str, trust_remote_code: bool = False, flag: str = "--model") -> tuple[Any, Path]:
    """Tokenizer and MLX folder of a model whose weights are not wanted yet. Raises ModelError as `load_model`."""
    folder = resolve_model(name, flag=flag)
    try:
        return load_words(folder, {"trust_remote_code": trust_remote_code}), folder
    except Exception as error:  # as above
        raise ModelError(f"{flag} {name}: its tokenizer cannot be loaded from {folder}: {_short(error)}") from error


def _short(error: Exception) -> str:
    """Another library's words on one line, cut where they go on to list every parameter."""
    text = " ".join(str(error).split())
    kind = f"{type(error).__name__}: " if isinstance(error, (KeyError, AttributeError, TypeError)) else ""
    return kind + (text if len(text) <= 300 else text[:299] + "…")


def widen(model: nn.Module) -> nn.Module:
    """Every half-precision parameter as float32, in place; packed integers stay."""
    halves = (mx.float16, mx.bfloat16)
    model.update(tree_map(lambda a: a.astype(mx.float32) if a.dtype in halves else a, model.parameters()))
    mx.eval(model.parameters())
    return model


def window(folder: Path) -> int:
    """How many tokens the model of this folder was made to read at once; without a word of it, no limit."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") or {}
    found = config.get("max_position_embeddings") or text.get("max_position_embeddings")
    return found if isinstance(found, int) else sys.maxsize


def apply_adapter(model: nn.Module, adapter_path: str | Path) -> dict[str, Any]:
    """Put an mlx-lm LoRA adapter on a loaded model; returns its adapter_config.json.

    Raises:
        ModelError: files missing or broken, numbers that are not finite, shapes of another model, or an adapter that
            leaves a layer empty.
    """
    config = _put_on(model, Path(adapter_path))
    if not on_gpu():
        widen(model)
    model.eval()
    return config


def check_adapter(folder: Path, adapter_path: str | Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Raise what `apply_adapter` would raise, without reading the model's weights; returns adapter_config.json."""
    skeleton, _ = load_weights(folder, lazy=True, trust_remote_code=trust_remote_code)
    return _put_on(skeleton, Path(adapter_path))


def _put_on(model: nn.Module, path: Path) -> dict[str, Any]:
    for file in ("adapter_config.json", "adapters.safetensors"):
        if not (path / file).is_file():
            raise ModelError(f"--adapter-path {path}: no {file} in it")
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        fault = _config_fault(config)
        if fault:
            raise ModelError(f"--adapter-path {path}: adapter_config.json: {fault}")
        saved = mx.load(str(path / "adapters.safetensors"))
        load_adapters(model, str(path))
    except (ValueError, RuntimeError, OSError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"--adapter-path {path}: does not fit this model: {_short(error)}") from error
    # mlx-lm accepts an adapter that covers only part of the layers; the rest would be left at random.
    missing = sorted(set(adapter_parameters(model)) - set(saved))
    if missing:
        raise ModelError(f"--adapter-path {path}: nothing in it for {missing[0]} and {len(missing) - 1} more")
    for name, array in saved.items():
        bad = array.size - mx.isfinite(array).sum().item()
        if bad:
            raise ModelError(
                f"--adapter-path {path}: {bad} of the {array.size} numbers of {name} are NaN or infinite: its training "
                "broke down. Take a checkpoint from before that, or train again with a lower --learning-rate"
            )
    return config


def _config_fault(config: Any) -> str:
    """What mlx-lm or we would stumble over in an adapter_config.json; '' where there is nothing."""
    if not isinstance(config, dict):
        return f"expected keys such as lora_parameters, found {config!r:.60}"
    targets = config.get("targets")
    if targets is not None and not (isinstance(targets, dict) and isinstance(targets.get("model", ""), str | None)):
        return f"targets: expected what duet_mlx.train writes there, or no such key; found {targets!r:.60}"
    if config.get("fine_tune_type", "lora") == "full":
        return ""
    lora = config.get("lora_parameters")
    if not isinstance(lora, dict):
        return f"lora_parameters: expected rank, scale and dropout, found {lora!r:.60}"
    for key, value, whole in (
        ("num_layers", config.get("num_layers"), True),
        ("rank", lora.get("rank"), True),
        ("scale", lora.get("scale"), False),
        ("dropout", lora.get("dropout"), False),
    ):
        kinds = int if whole else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool) or not -1e300 < value < 1e300:
            return f"{key}: expected a {'whole ' if whole else ''}number, found {value!r:.60}"
    keys = lora.get("keys")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        return f"keys: expected a list of names of modules, found {keys!r:.60}"
    return ""


def adapter_parameters(model: nn.Module) -> dict[str, mx.array]:
    """The LoRA parameters of a model by name, as mlx-lm saves them."""
    return {k: v for k, v in tree_flatten(model.parameters()) if k.rsplit(".", 1)[-1] in ("lora_a", "lora_b")}


def lora_keys(model: nn.Module, wanted: Sequence[str] | None = None) -> list[str]:
    """Modules of a layer to adapt: all linear ones but routers, or those `wanted`, by name inside the layer.

    Raises:
        ModelError: a wanted name that no layer has (with those it has).
    """
    kinds = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    found: dict[str, None] = {}
    for layer in model.layers:
        for name, module in layer.named_modules():
            if isinstance(module, kinds) or hasattr(module, "to_lora"):
                found[name] = None
    if wanted is None:
        return sorted(name for name in found if name.rsplit(".", 1)[-1] not in ROUTERS)
    outside = {name for name, module in model.named_modules() if isinstance(module, (*kinds, nn.Embedding))}
    for name in wanted:
        if name not in found and name not in outside:
            raise ModelError(f"lora_parameters keys: no module {name!r}; a layer has {', '.join(sorted(found))}")
    return list(wanted)


def outside_layers(model: nn.Module, keys: Sequence[str]) -> list[str]:
    """Those of LoRA's `keys` that are in no layer: embedding or head, whose rows can then not be gathered."""
    return [key for key in keys if not any(key in dict(layer.named_modules()) for layer in model.layers)]


def check_lora(model: nn.Module, num_layers: int, rank: int) -> None:
    """Raise ModelError for more layers than there are, or a rank beyond what any matrix of them can have."""
    if num_layers > len(model.layers) or num_layers < -1 or num_layers == 0:
        raise ModelError(f"--num-layers {num_layers}: the model has {len(model.layers)} (-1: all)")
    largest = max(max(array.shape) for layer in model.layers for _, array in tree_flatten(layer.parameters()))
    if rank > largest:
        raise ModelError(f"lora_parameters rank: {rank}, but no side of the model's matrices is above {largest}")


def add_lora(model: nn.Module, num_layers: int, rank: int, scale: float, dropout: float, keys: Sequence[str]) -> None:
    """LoRA by mlx-lm's own layers on the last `num_layers` (-1: all), the rest frozen.

    Raises:
        ModelError: as `check_lora`.
    """
    check_lora(model, num_layers, rank)
    model.freeze()
    linear_to_lora_layers(model, num_layers, {"rank": rank, "scale": scale, "dropout": dropout, "keys": set(keys)})


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of the frozen base in memory, by name and value, LoRA left out: the same before and after training."""
    lora = adapter_parameters(model)
    base = {name: array for name, array in tree_flatten(model.parameters()) if name not in lora}
    # LoRA wraps a module as `<name>.linear`, an embedding as `<name>.embedding`.
    return arrays_hash({k.replace(".linear.", ".").replace(".embedding.", "."): v for k, v in base.items()})


def arrays_hash(arrays: dict[str, mx.array]) -> str:
    """SHA-256 of arrays by name, shape, type and value."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(memoryview(mx.contiguous(array).view(mx.uint8)))
    return digest.hexdigest()


def hash_elsewhere(name: str, trust_remote_code: bool = False) -> str:
    """`weights_hash` of the same model on the other kind of backend: packed as on a GPU, or float32 as on a CPU."""
    return weights_hash(load_model(name, trust_remote_code=trust_remote_code, widened=on_gpu())[0])
