"""What comes out of the layers that are not trained, on the disk: 8 kB a token of an 8B model.

It is read a batch at a time, and the operating system keeps in memory as much of the file as there is room for. So
what fits is not fetched from the disk again, and nothing has to be set.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx
import numpy as np

from .errors import TrainingError


class KeptStates:
    """Hidden states [T, D] of N sequences, one after the other in a file that has no name.

    The system removes such a file when nobody holds it any more, also after a kill.
    """

    def __init__(self, folder: Path | None, lengths: Sequence[int], like: mx.array):
        """Make room for all of them.

        Args:
            folder: where the file is; None: where this machine has its temporary files.
            lengths: T of each sequence.  like: [..., D], of the states' type.

        Raises:
            TrainingError: the disk has no room.
        """
        self.folder, self.lengths = Path(folder or tempfile.gettempdir()), np.array(lengths, dtype=int)
        self.dtype, self.token = like.dtype, like.shape[-1] * like.dtype.size  # bytes
        ends = self.token * np.cumsum(self.lengths)
        self.starts, self.nbytes = ends - self.token * self.lengths, int(ends[-1])
        with self._room():
            self.file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115, it is read as long as this lives
            if hasattr(os, "posix_fallocate"):  # not on a Mac, where a full disk is found out while writing
                os.posix_fallocate(self.file.fileno(), 0, self.nbytes)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            with suppress(OSError):  # what found no room is tried once more
                self.file.close()

    def write(self, rows: Sequence[int] | np.ndarray, hidden: mx.array) -> None:
        """Write `hidden` [B, T, D] of these sequences; what is behind the end of each is left out."""
        taken = np.array(hidden.view(mx.uint8))  # NumPy has no bfloat16
        with self._room():
            for row, state in zip(rows, taken, strict=True):
                self.file.seek(self.starts[row])
                self.file.write(state[: self.lengths[row]])
            self.file.flush()

    def batch(self, rows: Sequence[int] | np.ndarray, width: int) -> mx.array:
        """The states of these sequences [B, width, D] as written; zeros on the right and where nothing is."""
        read = np.zeros((len(rows), width, self.token), dtype=np.uint8)
        for row, state in zip(rows, read, strict=True):
            self.file.seek(self.starts[row])
            self.file.readinto(state[: self.lengths[row]])
        return mx.array(read).view(self.dtype)

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{self.folder}: what comes out of the layers that are not trained cannot be written there, "
                f"{self.nbytes / 1e9:.3g} GB ({error.strerror}); make room, choose another --adapter-path, or train "
                "all layers (--num-layers -1)"
            ) from error
