"""The text decoder inside a checkpoint's own class, and that class cut down to what an extraction runs.

A checkpoint is always loaded by the class that its configuration names, multimodal wrappers included: transformers maps
the names and layouts of stored weights for that class only. What an extraction doesn't run (later layers, the LM head,
vision and audio towers) is removed between the creation of the empty model and the reading of the weights, so that it
is never read. The configuration stays as it is: the shapes of other layers may depend on it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fastcache.errors import ModelError

LAYER_LISTS = ("layers", "h", "blocks")
"""What transformers calls the list of decoder layers."""
LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
OTHER_PARTS = re.compile(r"(?:^|[._])(?:vision|visual|image|audio|video|projector|mtp|nextn|lm_head)(?=[._]|$)")
"""Parts of a checkpoint that an extraction never runs; `mtp` and `nextn` are layers for predicting further tokens."""


@dataclass(frozen=True)
class Decoder:
    """A text decoder that is ready to run."""

    model: Any
    """The innermost transformers model that contains the decoder layers. It takes token ids."""
    layers: nn.ModuleList
    unknown_weights: list[str] = field(default_factory=list)
    """Names of stored weights that belong to no part of the model."""


def checkpoint_class(config: Any, source_path: str, trust_remote_code: bool) -> Any:
    """The transformers class of a checkpoint: the one that its configuration names, else the usual one for its type.

    Raises `ModelError` where the installed transformers has none.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    auto_map = getattr(config, "auto_map", None) or {}
    for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel"):
        if trust_remote_code and name in auto_map:
            return get_class_from_dynamic_module(auto_map[name], source_path)
    for name in getattr(config, "architectures", None) or []:
        named = getattr(transformers, str(name), None)
        if isinstance(config, getattr(named, "config_class", None) or ()):
            return named
    for mapping in (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING,
        transformers.MODEL_MAPPING,
    ):
        usual = mapping.get(type(config), None)
        if _is_class_of(usual, config):
            return usual
    raise ModelError(
        f"transformers {transformers.__version__} has no model class for the type {config.model_type!r}. Install a "
        "version that has one, or use --trust-remote-code if the model brings its own code and you trust it."
    )


def _is_class_of(candidate: Any, config: Any) -> bool:
    """Whether `candidate` is a model class for this configuration, and not only for the text part of a wrapper."""
    wanted = getattr(candidate, "config_class", None)
    if not isinstance(wanted, type):
        return False
    return isinstance(config, wanted) or not isinstance(config.get_text_config(decoder=True), wanted)


def decoder_layers(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The list of decoder layers: the only list of `n_layers` modules in the text decoder, or the one with a usual name.

    Raises `ModelError` where there is none, or more than one.
    """
    get_decoder = getattr(model, "get_decoder", None)
    n_found = 0
    for part in ([get_decoder()] if get_decoder else []) + [model]:
        lists = {
            name: module
            for name, module in part.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == n_layers
        }
        n_found = len(lists)
        for candidates in (
            list(lists.values()),
            [m for name, m in lists.items() if name.split(".")[-1] in LAYER_LISTS],
        ):
            if len(candidates) == 1:
                return candidates[0]
    raise ModelError(
        f"{type(model).__name__} has {n_found} lists of {n_layers} layers, but one is needed to know which module "
        "computes a decoder layer. Its architecture isn't supported."
    )


def path_to(model: nn.Module, wanted: nn.Module) -> str:
    """The dotted name of the innermost transformers model that contains the module `wanted`; "" is `model` itself."""
    from transformers import PreTrainedModel

    holders = [
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and any(child is wanted for child in module.modules())
    ]
    return max(holders, key=len, default="")


def cut_class(cls: Any, n_layers: int, n_kept: int) -> Any:
    """A subclass of `cls` that creates the first `n_kept` of `n_layers` decoder layers and what they need.

    An instance has `decoder_path` and `layers_path`, the dotted names of its decoder and of the list of layers, and `omitted`,
    the names of the weights left out.
    """

    def cut(model: Any) -> None:
        before = set(model.state_dict())
        layers = decoder_layers(model, n_layers)
        model.decoder_path = path_to(model, layers)
        model.layers_path = next(name for name, module in model.named_modules() if module is layers)
        del layers[n_kept:]
        keep_only(model, set(model.get_submodule(model.decoder_path).modules()))
        model.omitted = before - set(model.state_dict())

    return changed_class(cls, cut)


def changed_class(cls: Any, change: Callable[[Any], None]) -> Any:
    """A subclass of `cls` whose new, still empty instances are changed by `change` before weights are read."""

    class Changed(cls):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            change(self)

    # transformers looks classes up by name, for example to map the names of weights.
    Changed.__name__, Changed.__qualname__, Changed.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Changed


def keep_only(model: Any, kept: set[nn.Module]) -> None:
    """Empty all of `model` but the modules `kept` and those whose weights are tied to theirs.

    Modules that contain a kept one lose their own weights only. Tied weights are kept because a checkpoint may store
    such a weight under one of its names alone.
    """
    _forget_absent_ties(model)
    pairs = [
        {model.get_submodule(name.rpartition(".")[0]) for name in pair} for pair in model.all_tied_weights_keys.items()
    ]
    _empty(model, kept.union(*(pair for pair in pairs if not kept.isdisjoint(pair))))
    _forget_absent_ties(model)


def _forget_absent_ties(model: Any) -> None:
    present = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    model.all_tied_weights_keys = {
        target: tied for target, tied in model.all_tied_weights_keys.items() if {target, tied} <= present
    }


def _empty(module: nn.Module, kept: set[nn.Module]) -> None:
    if module in kept:
        return
    for name, child in list(module.named_children()):
        if kept.isdisjoint(child.modules()):
            module._modules[name] = nn.Identity()
        else:
            _empty(child, kept)
    module._parameters.update(dict.fromkeys(module._parameters))
    module._buffers.update(dict.fromkeys(module._buffers.keys() - module._non_persistent_buffers_set))


def unknown_weights(unexpected: set[str], omitted: set[str], n_layers: int) -> list[str]:
    """Those of the `unexpected` stored weights that aren't of omitted parts of the model, nor of layers past the last."""
    endings = {name[start:] for name in omitted for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))}

    def is_known(name: str) -> bool:
        number = LAYER_NUMBER.search(name)
        return name in endings or bool(OTHER_PARTS.search(name)) or bool(number and int(number[1]) >= n_layers)

    return sorted(name for name in unexpected if not is_known(name))


def residual_stream(output: Any, config: Any) -> Tensor:
    """The residual stream `[n, d_in]` that a decoder layer returned for one sequence or pack, a view of its output.

    Gemma 3n keeps several versions of the stream; the one that its layers compute with ("active") is taken. Raises
    `ModelError` for models with several streams of equal rank, such as DeepSeek V4.
    """
    states = output[0] if isinstance(output, tuple) else output
    active = getattr(config, "altup_active_idx", None)
    if isinstance(states, Tensor) and active is not None and states.dim() == 4:
        states = states[active]
    if not isinstance(states, Tensor):
        raise ModelError(
            f"A decoder layer of this model ({config.model_type}) returns {type(states).__name__}, not the residual "
            "stream, so there is nothing that could be cached."
        )
    if states.dim() != 3 or states.shape[0] != 1 or states.shape[2] != config.hidden_size:
        shape = " x ".join(map(str, states.shape))
        several = " It has several residual streams, and none of them is the one." if states.dim() == 4 else ""
        raise ModelError(
            f"A decoder layer of this model ({config.model_type}) returns {shape} values, where one residual stream of "
            f"1 x {states.shape[1]} x {config.hidden_size} was expected.{several} fastcache can't cache this model."
        )
    return states[0]


class Enough(Exception):  # noqa: N818  (it isn't an error)
    """Ends a forward pass after the last layer that is needed."""


def enough(_module: nn.Module, _inputs: Any, _output: Any) -> None:
    """A forward hook that ends the pass: what follows (norm, LM head) would be computed for nothing."""
    raise Enough


def run_until_enough(model: Any, **inputs: Any) -> None:
    """Run `model` on `inputs` until a hook has had `Enough`."""
    try:
        model(**inputs)
    except Enough:
        return
