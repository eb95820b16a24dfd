"""Settings of `fastcache export`."""

from dataclasses import dataclass

from fastcache.config import Settings, option


@dataclass(frozen=True)
class ExportConfig(Settings):
    """Which SAE is written for which library."""

    sae: str = option(help="Folder of a trained SAE.")
    format: str = option("saelens", choices=("saelens",), help="Library that is to load it.")
