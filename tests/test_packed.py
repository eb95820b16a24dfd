"""Sequences in packs: each gets what it would get alone, or the model is run one sequence at a time."""

import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModel

from fastcache.errors import ModelError
from fastcache.llm import packed_attention
from fastcache.llm.decoder import decoder_layers
from fastcache.llm.loading import ModelSource
from fastcache.llm.packed_attention import Segments, UnknownAttentionError
from fastcache.llm.transformers_backend import TransformersBackend, packs, window_mismatch

HOOKS = ["resid_post.1", "resid_post.3"]
LENGTHS = (5, 40, 1, 16, 17, 100, 3, 90, 300)
WINDOW = 16  # shorter than most of the lengths
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA = {
    "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2 with windows": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "olmo2": ("Olmo2Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", GEMMA),  # soft-capped logits
    "gemma3": ("Gemma3TextConfig", GEMMA),  # another rope for each kind of layer
    "gpt2": ("GPT2Config", {}),  # learned positions
    "gpt-oss": (  # attention sinks, experts
        "GptOssConfig",
        {**GEMMA, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default"}},
    ),
    "llama4": (  # layers that see chunks, layers that count places themselves
        "Llama4TextConfig",
        {
            "head_dim": 8, "attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 64,
            "layer_types": ["chunked_attention", "full_attention"] * 2, "no_rope_layers": [1, 0, 1, 0],
            "floor_scale": 16,
        },
    ),
    "mixture of experts": (
        "Qwen3MoeConfig",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "linear attention": (
        "Qwen3NextConfig",
        {
            "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2, "num_experts": 0,
        },
    ),
    "convolutions": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": [1, 3]},
    ),
    "keywords that aren't handed on": ("StableLmConfig", {}),
}  # fmt: skip
FALLBACKS = {
    "bloom": ("BloomConfig", {}, "can't exchange its attention"),
    "rwkv": ("RwkvConfig", {"rescale_every": 2}, "can't exchange its attention"),
}


def make_model(folder, config_class: str, settings: dict):
    torch.manual_seed(0)
    model = AutoModel.from_config(getattr(transformers, config_class)(**{**SIZES, **settings}))
    model.save_pretrained(folder)
    return folder


def make_sequences(lengths=LENGTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, SIZES["vocab_size"], length).astype(np.int32) for length in lengths]


def plain_residuals(folder, sequences):
    """One plain forward pass for each sequence, with the attention that transformers chooses."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    caught = {}
    for hook in HOOKS:
        layer = decoder_layers(model, 4)[int(hook.split(".")[1])]
        layer.register_forward_hook(
            lambda _m, _i, out, hook=hook: caught.update({hook: out[0] if isinstance(out, tuple) else out})
        )
    for token_ids in sequences:
        with torch.no_grad():
            model(torch.tensor([token_ids.tolist()]), use_cache=False)
        yield {hook: states[0].numpy() for hook, states in caught.items()}


def make_backend(folder, **settings) -> TransformersBackend:
    return TransformersBackend(ModelSource(str(folder)), HOOKS, settings.pop("dtype", "float32"), "cpu", **settings)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("windowed"), *FAMILIES["qwen2 with windows"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_gives_the_bits_of_plain_runs(family, tmp_path):
    backend = make_backend(make_model(tmp_path, *FAMILIES[family]), pack_tokens=512)
    assert backend.note is None
    n_runs = []
    backend._model.register_forward_pre_hook(lambda _m, _i: n_runs.append(1))
    sequences = make_sequences()
    found = list(backend.residuals(sequences))
    # Some CPUs want short sequences alone; the long ones share two packs everywhere.
    n_alone = sum(len(token_ids) < backend._shortest for token_ids in sequences)
    assert len(n_runs) == len(list(packs(sequences, 512, backend._shortest))) <= 2 + 2 * n_alone
    for one, other in zip(found, plain_residuals(tmp_path, sequences), strict=True):
        for hook in HOOKS:
            assert np.array_equal(one[hook], other[hook])


@pytest.mark.parametrize("family", FALLBACKS)
def test_models_that_cannot_be_packed_run_one_at_a_time_and_say_so(family, tmp_path):
    config_class, settings, words = FALLBACKS[family]
    backend = make_backend(make_model(tmp_path, config_class, settings))
    assert words in backend.note
    sequences = make_sequences()
    for one, other in zip(backend.residuals(sequences), plain_residuals(tmp_path, sequences), strict=True):
        for hook in HOOKS:
            assert np.abs(one[hook] - other[hook]).max() < 1e-5


def test_an_encoder_decoder_is_refused(tmp_path):
    transformers.T5Config(d_model=32, d_ff=64, num_layers=4, num_heads=4, d_kv=8).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder-decoder"):
        make_backend(tmp_path)


def test_the_kv_cache_is_off(windowed):
    backend = make_backend(windowed)
    given = []
    backend._model.register_forward_pre_hook(lambda _m, _i, keywords: given.append(keywords), with_kwargs=True)
    list(backend.residuals(make_sequences()))
    assert {keywords["use_cache"] for keywords in given} == {False}
    assert "attention_mask" not in given[0]


def test_the_self_check_finds_a_pack_that_leaks(windowed, monkeypatch):
    honest = packed_attention.packed_attention

    def leaking(*given, fastcache_segments, **keywords):
        whole = Segments.of([fastcache_segments.bounds[-1]], "cpu")
        whole.windows = fastcache_segments.windows
        return honest(*given, fastcache_segments=whole, **keywords)

    monkeypatch.setattr(packed_attention, "packed_attention", leaking)
    backend = make_backend(windowed)
    monkeypatch.undo()
    packed_attention.register()
    assert "has neighbours" in backend.note
    sequences = make_sequences()
    for one, other in zip(backend.residuals(sequences), plain_residuals(windowed, sequences), strict=True):
        assert np.array_equal(one["resid_post.3"], other["resid_post.3"])


@pytest.mark.parametrize("pack_tokens", [2, 50, 100_000])
def test_the_budget_changes_no_bit(windowed, pack_tokens):
    sequences = make_sequences()
    alone = make_backend(windowed, pack_tokens=1).residuals(sequences)
    together = make_backend(windowed, pack_tokens=pack_tokens).residuals(sequences)
    for one, other in zip(together, alone, strict=True):
        for hook in HOOKS:
            assert np.array_equal(one[hook], other[hook])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_packs_in_half_precision_are_within_its_rounding(windowed, dtype):
    backend = make_backend(windowed, dtype=dtype)
    assert backend.note is None
    sequences = make_sequences()
    for one, other in zip(backend.residuals(sequences), plain_residuals(windowed, sequences), strict=True):
        assert one["resid_post.3"].dtype == np.float32
        difference = np.linalg.norm(one["resid_post.3"] - other["resid_post.3"])
        assert difference < 0.05 * np.linalg.norm(other["resid_post.3"])


def test_what_was_given_stays_as_it_is(windowed):
    backend = make_backend(windowed, pack_tokens=64)
    first = next(backend.residuals(make_sequences((30,))))["resid_post.1"]
    copy = first.copy()
    for _ in backend.residuals(make_sequences((30, 31, 29, 30))):
        pass
    assert np.array_equal(first, copy)


def test_nan_stays_in_its_own_sequence(tmp_path):
    make_model(tmp_path, *FAMILIES["qwen2"])
    model = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        model.embed_tokens.weight[96] = torch.nan
    model.save_pretrained(tmp_path)
    sequences = [token_ids % 96 for token_ids in make_sequences((20, 20, 20))]
    clean = [residuals["resid_post.3"] for residuals in make_backend(tmp_path).residuals(sequences)]
    sequences[1] = np.full(20, 96, np.int32)
    backend = make_backend(tmp_path)
    assert backend.note is None
    found = [residuals["resid_post.3"] for residuals in backend.residuals(sequences)]
    assert np.isnan(found[1]).all()
    assert np.array_equal(found[0], clean[0])
    assert np.array_equal(found[2], clean[2])


def test_packs_keep_order_and_budget_and_leave_long_sequences_alone():
    lengths = [4, 5, 1, 30, 2, 2, 10, 1]
    sequences = [np.full(length, index, np.int32) for index, length in enumerate(lengths)]
    found = [[int(token_ids[0]) for token_ids in pack] for pack in packs(sequences, 10)]
    assert found == [[0, 1, 2], [3], [4, 5], [6], [7]]


def test_no_more_than_two_packs_are_taken_ahead(windowed):
    taken = []

    def sequences():
        for token_ids in make_sequences((80,) * 50):
            taken.append(1)
            yield token_ids

    next(make_backend(windowed, pack_tokens=240).residuals(sequences()))
    assert len(taken) == 2 * 3 + 1  # the one more doesn't fit into the second pack


def test_extract_says_once_that_sequences_are_not_packed(tiny_qwen, chat_corpus, tmp_path, monkeypatch):
    from fastcache.progress import Silent
    from fastcache.stages.extract.config import ExtractConfig
    from fastcache.stages.extract.run import extract

    said = []
    monkeypatch.setattr(Silent, "say", lambda _self, text: said.append(text))
    monkeypatch.setattr(packed_attention, "packed_attention", refuse)
    extract(
        ExtractConfig(model=str(tiny_qwen), layer=(1,), parity=2), lambda: chat_corpus, tmp_path / "cache", Silent()
    )
    monkeypatch.undo()
    packed_attention.register()
    assert len([text for text in said if "one at a time" in text and "takes spice" in text]) == 1


def refuse(*_given, **_keywords):
    raise UnknownAttentionError("attention takes spice")


def test_positions_begin_anew_in_each_segment():
    segments = Segments.of([3, 1, 2], "cpu")
    assert segments.positions().tolist() == [0, 1, 2, 0, 0, 1]
    assert segments.on_device.tolist() == segments.bounds == [0, 3, 4, 6]
    assert segments.longest == 3


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"s_aux": torch.zeros(4)}, "takes s_aux"),
        ({"dropout": 0.1}, "dropout"),
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, "mask of its own"),
        ({"is_causal": False}, "isn't causal"),
        ({"fastcache_segments": None}, "hand keywords through"),
        ({"fastcache_segments": Segments.of([3], "cpu")}, "something else than the tokens"),
    ],
)
def test_attention_of_an_unknown_kind_is_refused(keywords, words):
    states = torch.zeros(1, 2, 4, 8)
    given = {"attention_mask": None, "fastcache_segments": Segments.of([4], "cpu"), **keywords}
    with pytest.raises(UnknownAttentionError, match=words):
        packed_attention.packed_attention(SimpleNamespace(), states, states, states, **given)


def reference_varlen(q, k, v, cu, scale, left):
    """Attention by segments, written out; `left` tokens before each are seen, all if it is -1."""
    out = torch.empty_like(q)
    k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], 1) for states in (k, v))
    for start, stop in pairwise(cu.tolist()):
        for place in range(start, stop):
            seen = slice(start if left < 0 else max(start, place - left), place + 1)
            weights = torch.softmax(torch.einsum("hd,khd->hk", q[place], k[seen]) * scale, 1)
            out[place] = torch.einsum("hk,khd->hd", weights, v[seen])
    return out


def fake_torch_varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert (max_q, max_k, window_size[1], enable_gqa) == (30, 30, 0, True)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    return reference_varlen(q, k, v, cu_seq_q, scale, window_size[0])


def fake_flash_varlen(
    q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)
):
    assert (max_q, max_k, window_size[1], causal) == (30, 30, 0, True)
    return reference_varlen(q, k, v, cu_q, softmax_scale, window_size[0])


@pytest.mark.parametrize("kind", ["_torch_varlen", "_flash_varlen"])
@pytest.mark.parametrize("window", [None, 7])
def test_varlen_kernels_are_asked_for_what_the_segment_loop_does(kind, window, monkeypatch):
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = fake_flash_varlen
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake_torch_varlen)
    torch.manual_seed(1)
    query, key, value = (torch.randn(1, heads, 42, 8) for heads in (4, 2, 2))

    def attend():
        segments = Segments.of([5, 30, 1, 6], "cpu")
        given = {"scaling": 0.3, "sliding_window": window, "fastcache_segments": segments}
        return packed_attention.packed_attention(SimpleNamespace(), query, key, value, None, **given)[0]

    expected = attend()
    kernel = getattr(packed_attention, kind)()
    monkeypatch.setattr(packed_attention, "varlen_kernel", lambda _query, _value: kernel)
    assert torch.allclose(attend(), expected, atol=1e-5)


def test_varlen_kernels_are_for_cuda_alone():
    states = torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16)
    assert packed_attention.varlen_kernel(states, states) is None


@pytest.mark.parametrize(
    ("settings", "windows", "words"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, {0: None, 1: 8}, ""),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, {0: None, 1: None}, "window"),
        ({"sliding_window": 8}, {0: 8, 1: 8}, ""),
        ({"sliding_window": 8}, {0: None, 1: None}, "window"),
        ({}, {0: None, 1: None}, ""),
        ({"layer_types": ["full_attention", "mamba"]}, {0: None}, "mamba"),
    ],
)
def test_windows_are_those_of_the_configuration(settings, windows, words):
    found = window_mismatch(SimpleNamespace(num_hidden_layers=2, **settings), windows)
    assert (words in found) if words else not found


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_a_lack_of_memory_is_no_reason_to_do_without_packs(windowed, monkeypatch, error):
    def fail_in_a_pack(backend, pack, run=TransformersBackend._run):
        if len(pack) > 1:
            raise error
        return run(backend, pack)

    monkeypatch.setattr(TransformersBackend, "_run", fail_in_a_pack)
    with pytest.raises(type(error)):
        make_backend(windowed)
