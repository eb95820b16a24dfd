"""SAE architectures, one small file each; `ARCHITECTURES` maps the name that `--arch` takes to the class."""

from fastcache.sae.architectures.base import Sae, StepFigures
from fastcache.sae.architectures.jumprelu import JumpReluSae
from fastcache.sae.architectures.standard import StandardSae

ARCHITECTURES: dict[str, type[Sae]] = {"standard": StandardSae, "jumprelu": JumpReluSae}

__all__ = ["ARCHITECTURES", "JumpReluSae", "Sae", "StandardSae", "StepFigures"]
