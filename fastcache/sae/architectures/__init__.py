"""SAE architectures, one small file each; `ARCHITECTURES` maps the name that `--arch` takes to the class."""

from fastcache.sae.architectures.base import Sae, StepFigures, StepInputs
from fastcache.sae.architectures.batchtopk import BatchTopKSae
from fastcache.sae.architectures.gated import GatedSae
from fastcache.sae.architectures.jumprelu import JumpReluSae, LogJumpReluSae
from fastcache.sae.architectures.matryoshka import MatryoshkaSae
from fastcache.sae.architectures.standard import StandardSae
from fastcache.sae.architectures.topk import TopKSae

ARCHITECTURES: dict[str, type[Sae]] = {
    cls.architecture: cls for cls in (StandardSae, JumpReluSae, TopKSae, BatchTopKSae, GatedSae, MatryoshkaSae)
}

__all__ = [
    "ARCHITECTURES", "BatchTopKSae", "GatedSae", "JumpReluSae", "LogJumpReluSae", "MatryoshkaSae", "Sae", "StandardSae",
    "StepFigures", "StepInputs", "TopKSae",
]  # fmt: skip
