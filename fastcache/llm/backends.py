"""Which backend runs a model, and opening it."""

from dataclasses import dataclass
from importlib.util import find_spec

from fastcache.errors import InputError
from fastcache.extras import require_packages
from fastcache.llm.backend import Backend
from fastcache.llm.loading import ModelSource
from fastcache.llm.self_test import SelfTest


def choose_backend(wanted: str, device: str, tensor_parallel: int, quantised: bool) -> tuple[str, str]:
    """The backend's name, and why it is this one; raises `InputError` for what isn't installed or can't be."""
    if wanted == "vllm":
        require_packages("--backend vllm", "vllm", "vllm")
        name, reason = "vllm", "asked for"
    elif wanted == "transformers":
        name, reason = "transformers", "asked for"
    elif find_spec("vllm") is None:
        name, reason = "transformers", "vllm is not installed"
    elif quantised:
        name, reason = "vllm", "it is installed, and the model is quantised"
    elif not device.startswith("cuda"):
        name, reason = "transformers", "there is no GPU"
    else:
        name, reason = "vllm", "it is installed, and there is a GPU"
    if tensor_parallel > 1 and name != "vllm":
        raise InputError(
            f"--tensor-parallel {tensor_parallel} is for --backend vllm; this would be {name} ({reason}). "
            "Leave it out, or say --backend vllm."
        )
    return name, reason


@dataclass(frozen=True)
class BackendPlan:
    """All that a process needs to open the model."""

    name: str
    source: ModelSource
    hook_points: tuple[str, ...]
    dtype: str
    devices: tuple[str, ...]
    """Of all workers, in turn; with tensor parallelism each takes several."""
    max_length: int
    pack_tokens: int | None = None
    tensor_parallel: int = 1
    self_test: SelfTest | None = None

    def open(self, number: int = 0) -> Backend:
        """The model for worker `number`; raises `ModelError`, and `MismatchError` where its self-test fails."""
        devices = self.devices_of(number)
        if self.name == "vllm":
            return self._open_vllm(devices)
        from fastcache.llm.transformers_backend import TransformersBackend

        return TransformersBackend(self.source, self.hook_points, self.dtype, devices[0], self.pack_tokens)

    def devices_of(self, number: int) -> list[str]:
        """The devices of worker `number`."""
        first = number * self.tensor_parallel
        return [self.devices[place % len(self.devices)] for place in range(first, first + self.tensor_parallel)]

    def _open_vllm(self, devices: list[str]) -> Backend:
        from fastcache.llm.vllm_backend.backend import VllmBackend

        backend = VllmBackend(
            self.source, self.hook_points, self.dtype, devices, self.max_length, batch_tokens=self.pack_tokens
        )
        if self.self_test is not None:
            self.self_test.check(backend, self.dtype, backend.batch_tokens)
        return backend
