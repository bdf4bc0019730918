"""DUET on MLX: a language model forgets a topic from questions alone.

Nothing is imported here, MLX least of all; `duet_mlx.BLAS` names the matrix library put in place for the CPU.
"""

import os
import sys

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
    preloaded = [name for name in names if "blas" in name.lower()]
    if not preloaded and "mlx.core" in sys.modules:  # too late: its symbols are bound
        return None
    # Debian's libblas.so.3 is whatever `update-alternatives` chose: only OpenBLAS is worth having. A second library
    # beside a preloaded one would start a second pool of threads.
    for name in preloaded or ("libopenblas.so.0", "libopenblasp.so.0", "libblas.so.3"):
        try:
            library = ctypes.CDLL(name)
            if hasattr(library, "openblas_get_config"):
                ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
                if not os.environ.get("OPENBLAS_NUM_THREADS"):
                    # Two streams compute side by side (generate.streams): half the cores for the products of each.
                    library.openblas_set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
                return os.path.basename(name)
        except OSError:
            continue
    return None


BLAS: str | None = _load_blas()
