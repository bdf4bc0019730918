"""Files of a run are written whole or not at all."""

import pytest

from duet_mlx.errors import TrainingError
from duet_mlx.files import write_text


def test_what_cannot_be_written_leaves_what_was_there_and_no_part_of_itself(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "mine").touch()
    with pytest.raises(TrainingError, match="log: cannot be written .* what was there before is untouched"):
        write_text(tmp_path / "log", "text")
    assert [path.name for path in tmp_path.rglob("*")] == ["log", "mine"]
