"""Tests beside other libraries; `make test-interop` runs them in an environment of their own."""

import sys
import types

import pytest


@pytest.fixture(scope="session")
def dictionary_learning():
    """The package without nnsight, which only its model side needs."""
    pytest.importorskip("einops", reason="dictionary-learning is not installed here: `make test-interop` has it")
    stand_in = types.ModuleType("nnsight")
    stand_in.LanguageModel = object
    sys.modules.setdefault("nnsight", stand_in)
    reason = "dictionary-learning is not installed here: `make test-interop` has it"
    return pytest.importorskip("dictionary_learning", reason=reason)
