"""Loading a model (hub id, MLX folder or .gguf) and putting LoRA on it, both through mlx-lm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import dequantize_model, load

from .errors import ModelError
from .gguf import convert_gguf

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


def resolve_model(name: str) -> Path:
    """The MLX folder of a hub id, a local folder or a .gguf file (converted once, beside itself).

    Raises:
        ModelError: nothing there, a folder without config.json or weights, or the hub cannot give it.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"--model {name}: no such file")
        return convert_gguf(path, widen=not on_gpu())
    if not path.exists():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise ModelError(f"--model {name}: no such folder or .gguf file, and not a hub id (owner/name)")
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(name, allow_patterns=HUB_FILES))
        except Exception as error:  # the hub client raises many kinds, all of them the same to the user
            raise ModelError(
                f"--model {name}: no local folder of that name, and the hub did not give it "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). Check the name, "
                "the network, or log in for a gated model"
            ) from error
    if not path.is_dir():
        raise ModelError(f"--model {name}: expected an MLX folder, a .gguf file or a hub id, found a plain file")
    if not (path / "config.json").is_file():
        raise ModelError(f"--model {name}: no config.json in it, so not an MLX model folder")
    if not list(path.glob("model*.safetensors")):
        raise ModelError(f"--model {name}: no model*.safetensors in it, so no weights to load")
    return path


def load_model(
    name: str, adapter_path: str | Path | None = None, trust_remote_code: bool = False
) -> tuple[nn.Module, object, Path]:
    """Load model and tokenizer, ready for the backend: on CPU the base is dequantized once, to float32.

    Args:
        name: hub id, MLX folder or .gguf.  adapter_path: an mlx-lm adapter folder to apply.

    Returns:
        (model in eval mode, mlx-lm's TokenizerWrapper, the MLX folder).

    Raises:
        ModelError: as `resolve_model`, or broken weights, unknown architecture, an adapter that does not fit.
    """
    folder = resolve_model(name)
    try:
        model, tokenizer = load(
            str(folder),
            tokenizer_config={"trust_remote_code": trust_remote_code},
            trust_remote_code=trust_remote_code,
        )
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"--model {name}: cannot be loaded from {folder}: {_short(error)}") from error
    if not on_gpu():
        # MLX's quantized product is a scalar loop on CPU, and half floats are slower still; the numbers are the same.
        model = widen(dequantize_model(widen(model)))
    model.freeze()
    model.eval()
    if adapter_path is not None:
        apply_adapter(model, adapter_path)
    return model, tokenizer, folder


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


def apply_adapter(model: nn.Module, adapter_path: str | Path) -> dict:
    """Put an mlx-lm LoRA adapter on a loaded model; returns its adapter_config.json.

    Raises:
        ModelError: files missing or broken, shapes of another model, or an adapter that leaves a layer empty.
    """
    path = Path(adapter_path)
    for file in ("adapter_config.json", "adapters.safetensors"):
        if not (path / file).is_file():
            raise ModelError(f"--adapter-path {path}: no {file} in it")
    try:
        config = json.loads((path / "adapter_config.json").read_text())
        saved = set(mx.load(str(path / "adapters.safetensors")))
        load_adapters(model, str(path))
    except (ValueError, RuntimeError, OSError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"--adapter-path {path}: does not fit this model: {_short(error)}") from error
    # mlx-lm accepts an adapter that covers only part of the layers; the rest would be left at random.
    missing = sorted(set(adapter_parameters(model)) - saved)
    if missing:
        raise ModelError(f"--adapter-path {path}: nothing in it for {missing[0]} and {len(missing) - 1} more")
    if not on_gpu():
        widen(model)
    model.eval()
    return config


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


def add_lora(model: nn.Module, num_layers: int, rank: int, scale: float, dropout: float, keys: Sequence[str]) -> None:
    """LoRA by mlx-lm's own layers on the last `num_layers` (-1: all), the rest frozen.

    Raises:
        ModelError: more layers asked for than there are.
    """
    if num_layers > len(model.layers) or num_layers < -1 or num_layers == 0:
        raise ModelError(f"--num-layers {num_layers}: the model has {len(model.layers)} (-1: all)")
    model.freeze()
    linear_to_lora_layers(model, num_layers, {"rank": rank, "scale": scale, "dropout": dropout, "keys": set(keys)})


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of the frozen base in memory, by name and value, LoRA left out: the same before and after training."""
    digest = hashlib.sha256()
    for name, array in sorted(tree_flatten(model.parameters())):
        if name.rsplit(".", 1)[-1] in ("lora_a", "lora_b"):
            continue
        # LoRA wraps a module as `<name>.linear`, an embedding as `<name>.embedding`.
        name = name.replace(".linear.", ".").replace(".embedding.", ".")
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(memoryview(mx.contiguous(array).view(mx.uint8)))
    return digest.hexdigest()
