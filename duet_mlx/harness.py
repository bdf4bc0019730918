"""Tasks of lm-evaluation-harness on a model, with or without an adapter, through mlx-lm's own wrapper.

    pip install 'duet-mlx[lm-eval]'
    python -m duet_mlx.harness --model M --adapter-path A --tasks mmlu --out results/
    python -m duet_mlx.harness --model M --tasks mine --include-path tasks/ --out results/    # tasks/mine.yaml

References: Gao et al., "The Language Model Evaluation Harness", 2024 (github.com/EleutherAI/lm-evaluation-harness).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import __version__
from .data import file_hash
from .errors import ConfigError, nearest, run_cli
from .settings import parse, require, setting


@dataclass(frozen=True)
class HarnessSettings:
    """Settings of a run of the harness; the flags are these fields."""

    model: str = setting("", "hub id, MLX folder or .gguf file")
    adapter_path: str | None = setting(None, "folder of the adapter; without it, the base")
    tasks: tuple[str, ...] = setting((), "names of the harness's tasks, or of those in --include-path")
    include_path: str | None = setting(None, "folder of YAML files with tasks of your own")
    num_shots: int | None = setting(None, "few-shot examples of each question (default: the task's own)")
    limit: int | None = setting(None, "ask only the first so many questions of each task")
    # Most tasks were written for base models; mlx-lm's own default is the template, where there is one.
    apply_chat_template: bool = setting(False, "put the questions through the model's chat template")
    max_tokens: int | None = setting(None, "most new tokens of an answer (default: the task's own)")
    batch_size: int = setting(8, "sequences run together: changes speed and memory alone")
    seed: int = setting(0, "seed of the harness: which few-shot examples it draws")
    overwrite: bool = setting(False, "replace the lm_eval.json that --out holds")
    trust_remote_code: bool = setting(False, "run code that comes with the model's tokenizer")
    out: str = setting("", "folder for lm_eval.json")


def run(settings: HarnessSettings) -> dict[str, Any]:
    """Run the tasks; write lm_eval.json (settings, versions, results, each question's log) and return it.

    Raises:
        ConfigError: settings, an unknown task, or the harness is not installed.  ModelError: model or adapter.
    """
    require(settings, "model", "tasks", "out")
    target = Path(settings.out) / "lm_eval.json"
    if target.exists() and not settings.overwrite:
        raise ConfigError(f"--out {settings.out}: holds lm_eval.json already; name another folder, or add --overwrite")
    if settings.include_path is not None and not Path(settings.include_path).is_dir():
        raise ConfigError(f"--include-path {settings.include_path}: no such folder")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the harness forks, and tokenizers would warn
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"lm-evaluation-harness is missing ({error}): pip install 'duet-mlx[lm-eval]'") from error
    manager = TaskManager(include_path=settings.include_path)
    for task in settings.tasks:
        if task not in manager.all_tasks:
            raise ConfigError(f"--tasks {task}: no such task{nearest(task, manager.all_tasks)}")

    from .model import load_model, weights_hash

    model, tokenizer, _ = load_model(settings.model, settings.adapter_path, settings.trust_remote_code)
    found = simple_evaluate(
        model=_wrapped(model, tokenizer, settings),
        tasks=list(settings.tasks),
        num_fewshot=settings.num_shots,
        limit=settings.limit,
        apply_chat_template=settings.apply_chat_template,
        task_manager=manager,
        random_seed=settings.seed,
        numpy_random_seed=settings.seed,
        torch_random_seed=None,
        fewshot_random_seed=settings.seed,
        bootstrap_iters=1000,
    )
    adapter = settings.adapter_path
    record = {
        "meta": {
            "settings": asdict(settings),
            "base_weights": weights_hash(model),
            "adapter": None if adapter is None else file_hash(Path(adapter) / "adapters.safetensors"),
            "versions": {"duet-mlx": __version__, **{name: version(name) for name in ("lm_eval", "mlx", "mlx-lm")}},
        },
        **{name: found[name] for name in ("results", "versions", "n-shot", "samples")},
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(".lm_eval.json.partial")
    partial.write_text(json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(partial, target)
    return record


def _wrapped(model: Any, tokenizer: Any, settings: HarnessSettings) -> Any:
    """mlx-lm's wrapper around a model that is loaded already: its own constructor knows no adapter, nor .gguf files."""
    from mlx_lm.evaluate import LM, MLXLM

    wrapper = MLXLM.__new__(MLXLM)
    LM.__init__(wrapper)
    # What MLXLM.__init__ sets (mlx_lm/evaluate.py); a test compares the names.
    wrapper._model, wrapper.tokenizer = model, tokenizer
    wrapper._max_tokens, wrapper._batch_size = settings.max_tokens, settings.batch_size
    wrapper.use_chat_template, wrapper._sampler = settings.apply_chat_template, None
    return wrapper


def main() -> None:
    """Run the tasks and print their figures."""
    settings = parse(HarnessSettings, "python -m duet_mlx.harness", __doc__ or "")
    for task, figures in run(settings)["results"].items():
        for name, value in figures.items():
            if isinstance(value, float) and "stderr" not in name:
                metric, _, variant = name.partition(",")
                error = figures.get(f"{metric}_stderr,{variant}")
                print(f"{task}  {name}  {value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else ""))


if __name__ == "__main__":
    run_cli(main)
