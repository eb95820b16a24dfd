"""Finding and loading models and tokenizers; what goes wrong there becomes a `ModelError` that says what to do."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from fastcache.assets import DEMO
from fastcache.cache_format.schema import layer_of
from fastcache.config import differences
from fastcache.errors import FastcacheError, InputError, MismatchError, ModelError
from fastcache.files import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLED_BYTES, SAMPLES = 2**20, 9


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: a name on the hub, a folder, or `demo`."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def path(self) -> str:
        """What transformers loads: the hub name or the folder."""
        return str(DEMO) if self.name == "demo" else self.name

    @property
    def is_local(self) -> bool:
        """Whether the files are in a folder of this machine."""
        return Path(self.path).is_dir()

    def require_existing(self) -> None:
        """Raise `ModelError` for a name that can only be a folder and is none; the hub need not be asked then."""
        if not self.is_local and (self.path.startswith(("/", ".", "~")) or self.path.count("/") > 1):
            raise ModelError(f"There is no folder {self.path!r}. --model takes a folder, a name on the hub, or `demo`.")

    def keywords(self) -> dict[str, Any]:
        """Arguments that every `from_pretrained` gets."""
        revision = {} if self.is_local else {"revision": self.revision}
        return {**revision, "trust_remote_code": self.trust_remote_code}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own messages off the screen."""
    from transformers.utils.logging import disable_progress_bar

    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _clear_errors(source: ModelSource, what: str) -> Iterator[None]:
    """Turn the errors of loading into one paragraph."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        if source.is_local:
            advice = f"{source.path} is a folder, but not one that transformers can load"
        else:
            advice = (
                "It is no folder here, and the hub could not give it: check the name, the network, or `hf auth login`"
            )
        raise ModelError(f"The {what} of model {source.name!r} can't be loaded. {advice}. ({reason})") from error


def load_tokenizer(source: ModelSource) -> "PreTrainedTokenizerBase":
    """The model's fast tokenizer; raises `ModelError` if there is none."""
    from transformers import AutoTokenizer

    with _clear_errors(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.keywords())
    if not tokenizer.is_fast:
        raise ModelError(f"Model {source.name!r} has no fast tokenizer; fastcache needs one for character offsets.")
    return tokenizer


def require_chat_template(tokenizer: "PreTrainedTokenizerBase", source: ModelSource) -> None:
    """Raise `ModelError` for a model without a chat template."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"Model {source.name!r} has no chat template, so it can't render dialogues. Use the instruct version of the "
            "model, or --method bt-p, which takes plain text."
        )


def load_config(source: ModelSource) -> Any:
    """The text model's configuration."""
    from transformers import AutoConfig

    source.require_existing()
    with _clear_errors(source, "configuration"):
        config = AutoConfig.from_pretrained(source.path, **source.keywords())
    if config.is_encoder_decoder:
        raise ModelError(
            f"Model {source.name!r} is an encoder-decoder ({config.model_type}); fastcache caches decoder-only models, "
            "whose layers see one sequence. Choose one of those."
        )
    text = config.get_text_config(decoder=True)
    if quantised := getattr(config, "quantization_config", None):  # stands on the outside of a model with several parts
        text.quantization_config = quantised
    return text


def check_layers(config: Any, hook_points: list[str], source: ModelSource, option: str = "--layer") -> None:
    """Raise `InputError`, with the valid range, for hook points that the model doesn't have."""
    n_layers = config.num_hidden_layers
    for hook in hook_points:
        if layer_of(hook) >= n_layers:
            raise InputError(
                f"{option} {layer_of(hook)}: {source.name!r} has {n_layers} layers, so {option} goes from 0 to {n_layers - 1}."
            )


def decoder_layers(model: torch.nn.Module, n_layers: int) -> torch.nn.ModuleList:
    """The list of decoder layers: the only list of that length in the model."""
    found = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n_layers]
    if len(found) != 1:
        raise ModelError(f"{type(model).__name__} has {len(found)} lists of {n_layers} layers; expected one.")
    return found[0]


def cut_layers(config: Any, n_layers: int) -> Any:
    """Have a configuration describe the model's first `n_layers` layers only; returns it."""
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = n_layers
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(text, name, None):
            with suppress(AttributeError):  # some models (Mamba, Jamba) work it out themselves
                setattr(text, name, getattr(text, name)[:n_layers])
    return config


def _base_config(source: ModelSource, n_layers: int | None) -> Any:
    """The configuration of the decoder, cut to its first `n_layers` layers."""
    config = load_config(source)
    return config if n_layers is None else cut_layers(config, n_layers)


def load_base_model(source: ModelSource, n_layers: int | None, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """The decoder without LM head, cut to its first `n_layers` layers: the others are never loaded."""
    from transformers import AutoModel

    config = _base_config(source, n_layers)
    with _clear_errors(source, "weights"):
        model = AutoModel.from_pretrained(source.path, config=config, dtype=dtype, **source.keywords())
    return model.to(device).eval()


def load_language_model(source: ModelSource, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """The whole model, with its LM head."""
    from transformers import AutoModelForCausalLM

    with _clear_errors(source, "weights"):
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, **source.keywords())
    return model.to(device).eval()


def count_parameters(source: ModelSource, n_layers: int | None) -> int:
    """Parameters of what `load_base_model` loads; no weight is read."""
    from transformers import AutoModel

    config = _base_config(source, n_layers)
    with _clear_errors(source, "configuration"), torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=source.trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def _weights_fingerprint(folder: Path) -> str:
    """Names, sizes and samples of the weight files: tells other weights apart without reading gigabytes."""
    digest = hashlib.sha256()
    paths = [path for pattern in ("*.safetensors", "*.bin", "*.pt") for path in sorted(folder.glob(pattern))]
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for place in range(SAMPLES):  # the last one reaches the end
                file.seek(max(0, (size - SAMPLED_BYTES) * place // (SAMPLES - 1)))
                digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()


def quantisation(config: Any) -> dict[str, Any]:
    """How the weights of a quantised model were made; empty for other models."""
    settings = getattr(config, "quantization_config", None) or {}
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    names = ("quant_method", "bits", "w_bit", "group_size", "q_group_size", "fmt", "format", "activation_scheme")
    return {name: settings[name] for name in names if name in settings}


def model_identity(source: ModelSource, config: Any) -> dict[str, Any]:
    """What tells this model from another: name, revision or weights, and the configuration's hash."""
    settings = {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}
    identity: dict[str, Any] = {"name": source.name, "config_sha256": fingerprint(settings)}
    if quantised := quantisation(config):
        identity["quantisation"] = quantised
    if source.is_local:
        return {**identity, "weights_sha256": _weights_fingerprint(Path(source.path))}
    return {**identity, "revision": getattr(config, "_commit_hash", None) or source.revision}


def known_model(identity: dict[str, Any], place: str | None, trust_remote_code: bool, what: str) -> ModelSource:
    """The model of this identity, at `place` or by its name; raises `MismatchError` where that is another than `what` is of."""
    source = ModelSource(place or identity["name"], identity.get("revision"), trust_remote_code)
    if found := differences({**identity, "name": ""}, {**model_identity(source, load_config(source)), "name": ""}):
        raise MismatchError(f"{what} is of another model than {source.name!r} ({'; '.join(found)}). Give --model.")
    return source


def known_tokenizer(
    identity: dict[str, Any], place: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of the model of this identity, at `place` or by its name; None where it isn't at hand."""
    try:
        return load_tokenizer(ModelSource(place or identity["name"], identity.get("revision"), trust_remote_code))
    except FastcacheError:
        return None


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Hashes of the vocabulary with its rules, and of the chat template."""
    backend = tokenizer.backend_tokenizer.to_str()
    return {
        "tokenizer_sha256": hashlib.sha256(backend.encode()).hexdigest(),
        "chat_template_sha256": fingerprint(tokenizer.chat_template),
    }
