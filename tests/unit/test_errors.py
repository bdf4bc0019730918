"""Commands end with one clear line and code 2 where the program is not at fault; BLAS loads without harm."""

import os
import subprocess
import sys
import types

import pytest

import duet_mlx
from duet_mlx import BLAS, CORES
from duet_mlx.errors import (
    ConfigError,
    ContextError,
    DataError,
    DuetError,
    ModelError,
    TrainingError,
    nearest,
    run_cli,
)


def ending(main, capsys):
    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    return ended.value.code, capsys.readouterr().err


def raising(error):
    def main():
        raise error

    return main


def test_a_command_that_returns_exits_with_0_and_says_nothing(capsys):
    assert ending(lambda: None, capsys) == (0, "")


@pytest.mark.parametrize("kind", [DuetError, DataError, ContextError, ModelError, ConfigError, TrainingError])
def test_a_typed_error_is_one_line_and_code_2(kind, capsys):
    assert ending(raising(kind("a.jsonl:3: blank")), capsys) == (2, "error: a.jsonl:3: blank\n")


def test_ctrl_c_is_one_line_and_code_2(capsys):
    code, said = ending(raising(KeyboardInterrupt()), capsys)
    assert code == 2 and said.startswith("error: interrupted") and said.count("\n") == 1


def test_a_full_disk_is_one_line_naming_the_file_and_code_2(capsys):
    code, said = ending(raising(OSError(28, "No space left on device", "out/adapters.safetensors")), capsys)
    assert code == 2 and "No space left on device" in said and "out/adapters.safetensors" in said


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_cli(raising(ZeroDivisionError()))


def test_output_cut_short_by_head_ends_without_a_traceback():
    program = "from duet_mlx.errors import run_cli\nrun_cli(lambda: print(('x' * 99 + '\\n') * 9999))"
    command = f'"{sys.executable}" -c "$PROGRAM" | head -n 1'
    ran = subprocess.run(["sh", "-c", command], env=os.environ | {"PROGRAM": program}, capture_output=True, text=True)
    assert ran.stdout == "x" * 99 + "\n" and ran.stderr == ""


def shell(command, program, **environment):
    env = os.environ | {"PROGRAM": program, "PYTHON": sys.executable} | environment
    return subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)


def test_a_note_that_nobody_reads_stops_no_work_and_ends_well(tmp_path):
    """As in `… 2>&1 | head`."""
    program = f"""
from duet_mlx.errors import note, run_cli
def main():
    for _ in range(9999):
        note("x" * 99)
    open({str(tmp_path / "results")!r}, "w").write("all")
run_cli(main)
"""
    ran = shell('"$PYTHON" -c "$PROGRAM" 2>&1 >/dev/null | head -n 1; echo "${PIPESTATUS[0]}"', program)
    assert ran.stdout == "x" * 99 + "\n0\n" and ran.stderr == ""
    assert (tmp_path / "results").read_text() == "all"


def test_an_ascii_terminal_shows_what_it_can():
    program = "from duet_mlx.errors import run_cli\nrun_cli(lambda: print('recall ↓ – 0.5'))"
    ran = shell('"$PYTHON" -c "$PROGRAM"', program, PYTHONIOENCODING="ascii")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "recall \\u2193 \\u2013 0.5\n", "")


def test_a_closed_stdout_is_no_fault():
    ran = shell('"$PYTHON" -c "$PROGRAM" >&-', "from duet_mlx.errors import run_cli\nrun_cli(lambda: print('x'))")
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file that is always full")
def test_a_full_disk_behind_stdout_is_one_line():
    program = "from duet_mlx.errors import run_cli\nrun_cli(lambda: print('x'))"
    ran = shell('"$PYTHON" -c "$PROGRAM" > /dev/full', program)
    assert ran.returncode == 2 and ran.stderr == "error: [Errno 28] No space left on device\n"


def test_the_nearest_name_is_offered_whatever_its_case_and_none_where_nothing_is_near():
    assert nearest("Quesion", ["question", "answer"]) == ' (did you mean "question"?)'
    assert nearest("QUESTION", ["Question"]) == ' (did you mean "Question"?)'
    assert nearest("xyz", ["question", "answer"]) == ""


def in_fresh_python(program, **environment):
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"} | environment
    ran = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    return ran.stdout.strip()


def test_importing_the_package_imports_neither_mlx_nor_numpy():
    program = "import sys, duet_mlx; print([m for m in ('mlx', 'mlx.core', 'numpy') if m in sys.modules])"
    assert in_fresh_python(program) == "[]"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="macOS computes on Metal and Accelerate")
def test_a_blas_that_was_preloaded_is_left_as_it_is():
    # Set after the start, for the loader would complain of a file that does not exist.
    program = "import os; os.environ['LD_PRELOAD'] = '/x/libblas.so.3'; import ctypes\n"
    program += "os.environ.pop('OPENBLAS_NUM_THREADS', None)\n"
    program += "ctypes.CDLL = lambda name: print(name)\n"  # of no library, None, where the preloaded one would be found
    ran = in_fresh_python(program + "import duet_mlx; print(duet_mlx.BLAS)", OPENBLAS_NUM_THREADS="")
    assert ran == "None\nlibblas.so.3"


@pytest.mark.skipif(BLAS is None, reason="no OpenBLAS here")
def test_each_of_two_streams_has_half_of_the_cores_for_products_unless_the_user_says_otherwise():
    program = "import ctypes, duet_mlx; print(ctypes.CDLL(None).openblas_get_num_threads())"
    half = max(1, len(os.sched_getaffinity(0)) // 2)
    assert in_fresh_python(program, OPENBLAS_NUM_THREADS="") == str(half)
    for threads in ("1", "2"):
        assert in_fresh_python(program, OPENBLAS_NUM_THREADS=threads) == threads


@pytest.mark.parametrize(
    ("core", "flags", "user", "loaded_as"),
    [
        ("Prescott", CORES["SkylakeX"] | CORES["Haswell"], None, "SkylakeX"),
        ("Prescott", CORES["Haswell"], None, "Haswell"),
        ("Prescott", {"sse3"}, None, None),  # it may be one
        ("Zen", CORES["Haswell"], None, None),
        ("Prescott", CORES["Haswell"], "Prescott", "Prescott"),  # the user's word
        (None, CORES["Haswell"], None, None),  # one that does not say
    ],
)
def test_an_openblas_older_than_the_processor_is_told_what_it_is(monkeypatch, core, flags, user, loaded_as):
    """By a stand-in for the library: no machine is of all these kinds."""
    library = types.SimpleNamespace(_handle=7)
    if core:
        library.openblas_get_corename = lambda: core.encode()
    loaded, closed = [], []
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    if user:
        monkeypatch.setenv("OPENBLAS_CORETYPE", user)
    monkeypatch.setattr(duet_mlx, "_flags", lambda: flags)
    monkeypatch.setattr("ctypes.CDLL", lambda name, mode: loaded.append((name, os.environ.get("OPENBLAS_CORETYPE"))))
    monkeypatch.setattr("_ctypes.dlclose", closed.append)
    duet_mlx._load_for_this_processor("openblas", library)
    assert loaded == [("openblas", loaded_as)] and closed == ([7] if loaded_as != user else [])
    assert os.environ.get("OPENBLAS_CORETYPE") == user


@pytest.mark.skipif(BLAS is None, reason="no OpenBLAS here")
def test_openblas_computes_for_what_the_processor_can_do():
    program = "import ctypes, duet_mlx; core = ctypes.CDLL(None).openblas_get_corename\n"
    core = in_fresh_python(program + "core.restype = ctypes.c_char_p; print(core().decode())")
    assert core != "Prescott" or "OPENBLAS_CORETYPE" in os.environ or not CORES["Haswell"] <= duet_mlx._flags()


def test_where_linux_does_not_say_what_the_processor_can_do_nothing_is_assumed(monkeypatch):
    def hidden(*asked, **more):
        raise PermissionError

    monkeypatch.setattr("builtins.open", hidden)
    assert duet_mlx._flags() == set()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a process has all cores")
def test_a_process_that_has_one_core_has_one_stream():
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    assert in_fresh_python(program + "from duet_mlx.generate import streams; print(len(streams()))") == "1"


def test_blas_is_not_loaded_after_mlx_for_it_would_change_nothing():
    program = "import sys, types; sys.modules['mlx.core'] = types.ModuleType('mlx.core')\n"
    assert in_fresh_python(program + "import duet_mlx; print(duet_mlx.BLAS)") == "None"


def test_without_any_openblas_the_package_imports_and_says_none():
    program = "import ctypes\ndef none(*a, **k): raise OSError\nctypes.CDLL = none\n"
    assert in_fresh_python(program + "import duet_mlx; print(duet_mlx.BLAS)") == "None"
