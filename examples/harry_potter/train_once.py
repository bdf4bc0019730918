"""Train as `python -m duet_mlx.train` would with the same flags, unless that very adapter is there already.

    python examples/harry_potter/train_once.py -c examples/harry_potter/config.yaml

What `make demo` runs. An adapter of the same settings, questions, context and base is kept; one whose
training was cut off is gone on with; any other is set aside under a name with its date, never overwritten.
"""

from __future__ import annotations

from duet_mlx.errors import run_cli
from duet_mlx.once import train_once
from duet_mlx.train import parse_settings


def main() -> None:
    """The flags are those of duet_mlx.train."""
    train_once(parse_settings("train_once.py", __doc__ or ""))


if __name__ == "__main__":
    run_cli(main)
