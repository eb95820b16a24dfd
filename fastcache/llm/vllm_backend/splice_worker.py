"""vLLM's worker, with the residual stream after one layer replaced on its way through."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform

from fastcache.llm.decoder import decoder_layers
from fastcache.llm.splicing import Replace

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as VllmWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as VllmWorker


class SpliceWorker(VllmWorker):
    """Runs without compilation: a hook on a layer is not in a compiled graph."""

    _hook: Any = None

    def fastcache_splice(
        self, layer: int = 0, maker: str | None = None, argument: Any = None, generated_only: bool = False
    ) -> None:
        """From now on replace the stream after `layer`, by what the function `maker` makes of `argument` and the device.

        `maker` is 'module:name'; without one the model is as it was. With `generated_only` prompts stay as they are.
        """
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if maker is None:
            return
        module, _, name = maker.partition(":")
        replace = getattr(import_module(module), name)(argument, str(self.device))

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            return _spliced(output, replace, _is_generated(self.model_runner) if generated_only else None)

        n_layers = self.model_config.get_total_num_hidden_layers()
        layers = decoder_layers(self.model_runner.get_model(), n_layers)
        self._hook = layers[layer].register_forward_hook(hook)


def _is_generated(runner: Any) -> Tensor:
    """Which rows of the batch that is being run, bool `[n]`, lie behind their prompt.

    After a preemption, a request's prompt and what it had generated come in one piece.
    """
    batch = runner.input_batch
    n = int(runner.query_start_loc.np[batch.num_reqs])
    prompt_lengths = torch.from_numpy(batch.num_prompt_tokens[runner.req_indices.np[:n]])
    return runner.positions[:n] >= prompt_lengths.to(runner.positions.device)


def _spliced(output: Any, replace: Replace, rows: Tensor | None) -> Any:
    """vLLM's layers give what they add and the stream before it apart; their sum is the residual stream.

    Replaces it where `rows`, bool, is true, or everywhere.
    """
    hidden, residual = output if isinstance(output, tuple) else (output, None)
    stream = hidden if residual is None else hidden + residual
    if rows is None:
        new = replace(stream.float()).to(stream.dtype).contiguous()  # the next layer writes into it
    else:
        new, places = stream.clone(), rows.nonzero()[:, 0]
        new[places] = replace(stream[places].float()).to(stream.dtype)
    return new if residual is None else (new, torch.zeros_like(residual))
