"""`fastcache evaluate`."""

from typing import Any

import click

from fastcache.pipeline.command import Command
from fastcache.pipeline.console import RichProgress, make_console
from fastcache.pipeline.options import resolve, settings_options
from fastcache.stages.evaluate.config import EvaluateConfig

HELP = """Measure SAEs on held-out dialogues: MSE by kind of token, FVU, L0, dead latents. No model is needed.

With --with-model it is run too, with the reconstructions in its residual stream: loss added and recovered, KL.
Writes evaluation.json into each SAE's folder.

\b
Examples:
  fastcache evaluate --sae DIR --cache fastcache-runs/cache-demo-fast-eval-layer-2
  fastcache evaluate --sae A --sae B --sae C --cache HELD_OUT_CACHE
  fastcache evaluate --sae A --cache HELD_OUT_CACHE --with-model --model-instances 100
  fastcache evaluate --sae A --cache HELD_OUT_CACHE --with-model --model-backend vllm
"""


@click.command(cls=Command, help=HELP)
@settings_options(EvaluateConfig)
def command(**given: Any) -> None:
    """Run the evaluate stage."""
    config = resolve(EvaluateConfig, given)
    from fastcache.pipeline.next_steps import after_evaluate
    from fastcache.pipeline.show import show_evaluations
    from fastcache.stages.evaluate.run import evaluate

    progress = RichProgress(make_console())
    show_evaluations(progress.console, evaluate(config, progress))
    progress.say_commands("Next:", after_evaluate(config.sae, config.cache))
