"""fastcache: cache an LLM's residual activations over chat dialogues once, train many SAEs from the cache.

cache = fastcache.open_cache("my-cache")
cache.instance(0).residuals("resid_post.18")  # float32 numpy [n_tokens, d_in]
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcache.cache_format.reader import open_cache

__version__ = "0.1.0"
__all__ = ["__version__", "open_cache"]


def __getattr__(name: str) -> Any:
    # Zarr takes a third of a second to import; `fastcache --help` doesn't need it.
    if name == "open_cache":
        from fastcache.cache_format.reader import open_cache

        return open_cache
    raise AttributeError(f"module 'fastcache' has no attribute {name!r}")
