"""Parts of a model that would mix the sequences of a pack run on one sequence after another, or by given boundaries."""

from itertools import pairwise

import pytest
import torch
import transformers
from test_packed import FAMILIES, make_backend, make_model, make_sequences
from torch import nn

from fastcache.llm.packed_attention import Segments, use_segments
from fastcache.llm.parity import relative_difference
from fastcache.llm.segment_loop import SegmentLoops


class CumulativeSum(nn.Module):
    """Mixes tokens of one sequence, and must get what belongs to it alone."""

    def forward(self, states, positions=None, offset=0, extra=()):
        out = states.cumsum(1) + offset
        if positions is not None:
            out = out + positions[..., None]
        return (out + sum(part for part in extra), torch.ones(1, 1, states.shape[1], states.shape[1]))


def test_a_module_sees_one_sequence_at_a_time():
    module, segments = CumulativeSum(), Segments.of([3, 1, 4], "cpu")
    states, extra = torch.randn(1, 8, 2), torch.randn(1, 8, 2)
    positions = segments.positions()[None]
    parts = list(pairwise(segments.bounds))
    expected = [module(states[:, a:b], positions[:, a:b], offset=2, extra=[extra[:, a:b]])[0] for a, b in parts]
    loops = SegmentLoops([module])
    with use_segments(segments):
        out, weights = module(states, positions, offset=2, extra=[extra])
    assert torch.equal(out, torch.cat(expected, 1))
    assert weights is None  # it isn't by token
    assert torch.equal(module(states)[0], states.cumsum(1))  # outside of a pack
    loops.undo()
    with use_segments(segments):
        assert torch.equal(module(states)[0], states.cumsum(1))


@pytest.mark.parametrize("n", [2, 8])
def test_rows_without_a_batch_dimension_are_cut_too(n):
    module, segments = nn.Linear(n, n), Segments.of([1, n - 1], "cpu")  # as many rows as columns
    seen = []
    module.register_forward_pre_hook(lambda _module, given: seen.append(given[0].shape[0]))
    SegmentLoops([module])
    with use_segments(segments):
        out = module(torch.randn(n, n))
    assert out.shape == (n, n)
    with use_segments(segments):
        module.forward(torch.randn(n, n))
    assert seen == [n]


def test_kernels_that_take_boundaries_are_given_them(tmp_path, monkeypatch):
    """Stand-ins for GPU kernels: transformers' plain functions, which run by the boundaries that they are given."""
    modelling = transformers.models.qwen3_next.modeling_qwen3_next
    plain_rule, plain_conv = modelling.torch_chunk_gated_delta_rule, modelling.causal_conv1d_fn

    def rule(q, k, v, g, beta, cu_seqlens=None, use_qk_l2norm_in_kernel=False, **_keywords):
        parts = pairwise([0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist())
        rows = [tuple(x[:, start:stop] for x in (q, k, v, g, beta)) for start, stop in parts]
        normed = {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
        found = [plain_rule(*row[:3], g=row[3], beta=row[4], **normed)[0] for row in rows]
        return torch.cat(found, 1), None

    def conv(x, weight, bias, activation, seq_idx=None, **_keywords):
        counts = [x.shape[2]] if seq_idx is None else torch.bincount(seq_idx[0]).tolist()
        return torch.cat([plain_conv(part, weight, bias, activation=activation) for part in x.split(counts, 2)], 2)

    monkeypatch.setattr(modelling, "torch_chunk_gated_delta_rule", rule)
    monkeypatch.setattr(modelling, "causal_conv1d_fn", conv)
    backend = make_backend(make_model(tmp_path, *FAMILIES["linear attention"]), dtype="bfloat16")
    assert backend.manner == "in packs"
    sequences = make_sequences()
    alone = make_backend(tmp_path, dtype="bfloat16", pack_tokens=1).residuals(sequences)
    for one, other in zip(backend.residuals(sequences), alone, strict=True):
        assert relative_difference(one["resid_post.3"], other["resid_post.3"]) < 0.05
