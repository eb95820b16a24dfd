"""How a run uses its model: by which backend, on which devices, in which dtype, at which hook points."""

from dataclasses import dataclass
from typing import Any

from fastcache.devices import choose_device, default_dtype
from fastcache.llm.backends import BackendPlan, choose_backend
from fastcache.llm.loading import ModelSource, quantisation
from fastcache.llm.self_test import SelfTest
from fastcache.progress import Progress
from fastcache.stages.extract.config import ExtractConfig


@dataclass
class ModelUse:
    """Settled before the model is loaded; raises `InputError` for devices and backends that aren't there."""

    config: ExtractConfig
    source: ModelSource
    llm_config: Any
    hook_points: list[str]
    """By layer."""
    longest: int
    """Most tokens of a sequence."""

    def __post_init__(self) -> None:
        config, quantised = self.config, bool(quantisation(self.llm_config))
        self.device = choose_device(config.device)
        self.backend, self.reason = choose_backend(config.backend, self.device, config.tensor_parallel, quantised)
        self.model_dtype = config.model_dtype or default_dtype(self.device)
        self.n_checked = 0 if quantised else config.parity
        """Sequences that are compared with the plain model; of a quantised one there is none."""

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices of the workers, in turn."""
        return tuple(map(choose_device, self.config.devices)) or (self.device,)

    @property
    def n_workers(self) -> int:
        """Worker processes: one for each device, or group of devices, or as many as asked for."""
        return self.config.workers or max(1, len(self.devices) // self.config.tensor_parallel)

    def say(self, progress: Progress) -> None:
        """Say which backend it is, and why."""
        progress.say(f"Backend: {self.backend} ({self.reason}).")
        if self.config.parity and not self.n_checked:
            progress.say("The model is quantised: there is no plain one to compare it with, and no parity check.")

    def plan(self) -> BackendPlan:
        """What a process needs to open the model; with vLLM, runs the reference of its self-test."""
        hooks, config, self_test = tuple(self.hook_points), self.config, None
        if self.backend == "vllm" and self.n_checked:
            self_test = SelfTest.of(self.source, hooks, self.longest)
        return BackendPlan(
            self.backend, self.source, hooks, self.model_dtype, self.devices, self.longest, config.pack_tokens,
            config.tensor_parallel, self_test,
        )  # fmt: skip
