"""fastcache: cache an LLM's residual activations over chat dialogues once, train many SAEs from the cache.

cache = fastcache.open_cache("my-cache")
cache.instance(0).residuals("resid_post.18")  # float32 numpy [n_tokens, d_in]
"""

import os

TYPE_CHECKING = False
"""As type checkers know it. Ctrl-C is understood once `__main__` runs, and typing would be imported before that."""

# What a product of matrices rounds to must not depend on earlier commands of a process, on neighbouring rows or on load. MKL
# picks its float32 kernels by the number of rows and threads; strict mode ends that at no cost that was measured. MKL reads it
# at the first product of a process. A dynamic OpenMP takes fewer threads under load; it reads this when torch is loaded.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ["OMP_DYNAMIC"] = "FALSE"

if TYPE_CHECKING:
    from typing import Any

    from fastcache.cache_format.reader import open_cache

__version__ = "0.1.0"
__all__ = ["__version__", "open_cache"]


def __getattr__(name: str) -> "Any":
    # Zarr takes a third of a second to import; `fastcache --help` doesn't need it.
    if name == "open_cache":
        from fastcache.cache_format.reader import open_cache

        return open_cache
    raise AttributeError(f"module 'fastcache' has no attribute {name!r}")
