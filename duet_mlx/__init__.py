"""DUET on MLX: a language model forgets a topic from questions alone.

Nothing is imported here, MLX least of all; `duet_mlx.BLAS` names the matrix library put in place for the CPU.
"""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ctypes

__version__ = "0.1.0"


def _load_blas() -> str | None:
    """Put OpenBLAS in front of the reference BLAS of MLX's Linux wheels, 40 times slower on fp32 products.

    It must be in the process, with global symbols, before the first `import mlx.core`. Returns the library's
    name, or None where there is nothing to do (not Linux) or none was found; never raises, never prints.
    """
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    names = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    found = next((os.path.basename(name) for name in names if "blas" in name.lower()), None)
    if found is None and "mlx.core" in sys.modules:  # too late: its symbols are bound
        return None
    # Debian's libblas.so.3 is whatever `update-alternatives` chose: only OpenBLAS is worth having. Not beside one
    # that is preloaded: it would start a second pool of threads.
    for name in () if found else ("libopenblas.so.0", "libopenblasp.so.0", "libblas.so.3"):
        try:
            if hasattr(library := ctypes.CDLL(name), "openblas_get_config"):
                _load_for_this_processor(name, library)
                found = name
                break
        except OSError:
            continue
    return found


# What an OpenBLAS may have code for, best first, and the flags by which Linux says that a processor can run it.
CORES = {"SkylakeX": {"avx512f", "avx512bw", "avx512dq", "avx512cd", "avx512vl"}, "Haswell": {"avx2", "fma"}}


def _load_for_this_processor(name: str, library: "ctypes.CDLL") -> None:
    """Load OpenBLAS with global symbols; one that is older than the processor, as a core that it knows.

    It would take a processor it has not heard of for a Prescott of 2004: products at a quarter of the speed.
    """
    import _ctypes
    import ctypes

    core = None
    if "OPENBLAS_CORETYPE" not in os.environ and _core_of(library) == b"Prescott":
        core = next((core for core, needed in CORES.items() if needed <= _flags()), None)
    if core:
        _ctypes.dlclose(library._handle)  # it asks for the variable once, when it is loaded
        os.environ["OPENBLAS_CORETYPE"] = core
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    finally:
        if core:
            del os.environ["OPENBLAS_CORETYPE"]


def _core_of(library: "ctypes.CDLL") -> bytes | None:
    """The processor that an OpenBLAS computes for, by its name; None where it does not say."""
    import ctypes

    if not hasattr(library, "openblas_get_corename"):
        return None
    library.openblas_get_corename.restype = ctypes.c_char_p
    return library.openblas_get_corename()


def _flags() -> set[str]:
    """What this processor can do, in Linux's words; nothing where Linux does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            return next((set(line.split()) for line in cpuinfo if line.startswith("flags")), set())
    except (OSError, ValueError):
        return set()


def cores() -> int:
    """How many cores this process may use: those that `taskset` or a cpuset leaves to it."""
    ours = getattr(os, "sched_getaffinity", None)  # Linux has it, macOS does not
    return len(ours(0)) if ours else os.cpu_count() or 1


def share_cores(streams: int) -> None:
    """Give the matrix products of each of so many streams their part of the cores.

    Only OpenBLAS needs to be told, and not where OPENBLAS_NUM_THREADS says how many threads it is to have.
    """
    if BLAS and not os.environ.get("OPENBLAS_NUM_THREADS"):
        import ctypes

        limit = getattr(ctypes.CDLL(None), "openblas_set_num_threads", lambda threads: None)
        limit(max(1, cores() // streams))


BLAS: str | None = _load_blas()
share_cores(min(2, cores()))  # as many as generate.streams() has
