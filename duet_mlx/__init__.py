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
    names = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    preloaded = [name for name in names if "blas" in name.lower()]
    if preloaded:  # done already: a second library would start a second pool of threads
        return os.path.basename(preloaded[0])
    if "mlx.core" in sys.modules:  # too late: its symbols are bound
        return None
    import ctypes

    # Half the cores to a product: two halves of each batch are computed side by side (generate.streams).
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))

    # Debian's libblas.so.3 is whatever `update-alternatives` chose: only OpenBLAS is worth having.
    for name in ("libopenblas.so.0", "libopenblasp.so.0", "libblas.so.3"):
        try:
            if hasattr(ctypes.CDLL(name), "openblas_get_config"):
                ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
                return name
        except OSError:
            continue
    return None


BLAS: str | None = _load_blas()
