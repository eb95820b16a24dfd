"""Fixtures of the tests with real vLLM."""

import pytest

from with_vllm.models import demo_as_llama
from with_vllm.served import serving


@pytest.fixture(scope="session")
def llama_demo(tmp_path_factory):
    """The demo's model in a form that vLLM runs."""
    return demo_as_llama(tmp_path_factory.mktemp("llama-demo"))


@pytest.fixture(scope="session")
def served_demo(llama_demo, tmp_path_factory):
    """A server of it, which ends with the tests."""
    with serving(llama_demo, tmp_path_factory.mktemp("served") / "log.txt", "demo", "a-key-of-the-tests") as served:
        yield served
