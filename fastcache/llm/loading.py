"""Finding and loading models and tokenizers; what goes wrong there becomes a `ModelError` that says what to do."""

import hashlib
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastcache.assets import DEMO
from fastcache.cache_format.schema import layer_of
from fastcache.config import differences
from fastcache.errors import FastcacheError, InputError, MismatchError, ModelError
from fastcache.files import fingerprint, read_json
from fastcache.llm.decoder import Decoder, checkpoint_class, cut_class, unknown_weights
from fastcache.llm.model_files import reason_of, require_readable_files, require_sound_config, require_vocabulary
from fastcache.llm.stored_weights import absent_experts, stored_names
from fastcache.rundir import RUN_FILE, stored_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLED_BYTES, SAMPLES = 2**20, 9


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: a name on the hub, a folder, or `demo`."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    place: str | None = None
    """Where the folder is, if it isn't at `name`: a relative path that was said in another directory, or a moved folder."""

    @property
    def path(self) -> str:
        """What transformers loads: the hub name or the folder."""
        return self.place or (str(DEMO) if self.name == "demo" else self.name)

    @property
    def is_local(self) -> bool:
        """Whether the files are in a folder of this machine."""
        return Path(self.path).is_dir()

    @property
    def folder(self) -> Path:
        """Where the files are, on this machine; of a model of the hub, what was downloaded."""
        if self.is_local:
            return Path(self.path)
        from transformers.utils import cached_file

        return Path(cached_file(self.path, "config.json", revision=self.revision, local_files_only=True)).parent

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
def loading_errors(source: ModelSource, what: str) -> Iterator[None]:
    """Turn whatever a library raises while it loads `what` into a `ModelError`; only its calls belong inside."""
    if source.is_local:
        require_readable_files(Path(source.path), source.name)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # the error that follows says what matters
            yield
    except (FastcacheError, MemoryError):
        raise
    except BaseException as error:
        # Damaged files make libraries raise anything; a panic of Rust, as tokenizers has them, isn't even an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if source.is_local:
            advice = f"Get the files in {source.path} again, or correct them"
        else:
            advice = (
                "It is no folder here, and the hub could not give it: check the name, the network, or `hf auth login`"
            )
        raise ModelError(
            f"The {what} of model {source.name!r} can't be loaded: {reason_of(error)}. {advice}."
        ) from error


@contextmanager
def weight_errors(source: ModelSource, what: str) -> Iterator[None]:
    """`loading_errors`, which also names the experts that a checkpoint lacks: libraries fail on them in many ways."""
    try:
        with loading_errors(source, what):
            yield
    except ModelError as error:
        if absent := absent_experts(stored_names(source.folder)):
            raise ModelError(_lacks(source, absent)) from error
        raise


def load_tokenizer(source: ModelSource) -> "PreTrainedTokenizerBase":
    """The model's fast tokenizer; raises `ModelError` if there is none."""
    from transformers import AutoTokenizer

    with loading_errors(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.keywords())
    if not tokenizer.is_fast:
        raise ModelError(f"Model {source.name!r} has no fast tokenizer; fastcache needs one for character offsets.")
    require_vocabulary(tokenizer, source.name)
    return tokenizer


def require_chat_template(tokenizer: "PreTrainedTokenizerBase", source: ModelSource) -> None:
    """Raise `ModelError` for a model without a chat template."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"Model {source.name!r} has no chat template, so it can't render dialogues. Use the instruct version of the "
            "model, or cache plain text, by `fastcache extract --method bt-p`."
        )


def load_whole_config(source: ModelSource) -> Any:
    """The checkpoint's own configuration; that of a multimodal wrapper contains a text configuration."""
    from transformers import AutoConfig

    source.require_existing()
    with loading_errors(source, "configuration"):
        config = AutoConfig.from_pretrained(source.path, **source.keywords())
    if config.is_encoder_decoder:
        raise ModelError(
            f"Model {source.name!r} is an encoder-decoder ({config.model_type}); fastcache caches decoder-only models, "
            "whose layers see one sequence. Choose one of those."
        )
    return config


def load_config(source: ModelSource) -> Any:
    """The text decoder's configuration."""
    config = load_whole_config(source)
    text = config.get_text_config(decoder=True)
    if quantised := getattr(config, "quantization_config", None):  # stands on the outside of a model with several parts
        text.quantization_config = quantised
    require_sound_config(text, source.name)
    return text


def check_layers(config: Any, hook_points: list[str], source: ModelSource, option: str = "--layer") -> None:
    """Raise `InputError`, with the valid range, for hook points that the model doesn't have."""
    n_layers = config.num_hidden_layers
    for hook in hook_points:
        if layer_of(hook) >= n_layers:
            raise InputError(
                f"{option} {layer_of(hook)}: {source.name!r} has {n_layers} layers, so {option} goes from 0 to {n_layers - 1}."
            )


def cut_layers(config: Any, n_layers: int) -> Any:
    """Have a configuration describe the model's first `n_layers` layers only; returns it."""
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = n_layers
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(text, name, None):
            with suppress(AttributeError):  # some models (Mamba, Jamba) work it out themselves
                setattr(text, name, getattr(text, name)[:n_layers])
    return config


def load_decoder(source: ModelSource, n_kept: int, dtype: torch.dtype, device: str) -> Decoder:
    """The text decoder without LM head, cut to its first `n_kept` layers; the weights of the others are never read.

    Raises `ModelError` for a model that can't be loaded, or that lacks a weight.
    """
    config = load_whole_config(source)
    n_layers = config.get_text_config(decoder=True).num_hidden_layers
    cut = cut_class(checkpoint_class(config, source.path, source.trust_remote_code), n_layers, n_kept)
    with weight_errors(source, "weights"):
        model, report = cut.from_pretrained(source.path, config=config, dtype=dtype, **WITH_REPORT, **source.keywords())
    require_complete(report, source)
    unknown = unknown_weights(report["unexpected_keys"], model.omitted, n_layers)
    decoder: Any = model.get_submodule(model.decoder_path).to(device).eval()
    return Decoder(decoder, model.get_submodule(model.layers_path), unknown)


def load_language_model(source: ModelSource, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """The whole model with its LM head, as users of transformers load it; a wrapper keeps its other parts.

    Raises `ModelError` for a model that can't be loaded, or that lacks a weight.
    """
    import transformers

    config = load_whole_config(source)
    is_wrapper = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = transformers.AutoModelForImageTextToText if is_wrapper else transformers.AutoModelForCausalLM
    with weight_errors(source, "weights"):
        model, report = auto.from_pretrained(source.path, dtype=dtype, **WITH_REPORT, **source.keywords())
    require_complete(report, source)
    return model.to(device).eval()


WITH_REPORT: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Have `from_pretrained` report what it initialises at random instead, so that the error can name it."""


ADVICE = "Nothing was computed. The files may be incomplete or of another model: get them again."


def _lacks(source: ModelSource, names: list[str]) -> str:
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"The checkpoint of model {source.name!r} lacks weights that the model needs: {listed}. {ADVICE}"


def require_complete(report: dict[str, Any], source: ModelSource) -> None:
    """Raise `ModelError`, naming them, for weights that a checkpoint lacks or has in another shape than the model."""
    if missing := sorted(report["missing_keys"]):
        raise ModelError(_lacks(source, missing))
    for name, stored, expected in sorted(report["mismatched_keys"]):
        if absent := absent_experts(stored_names(source.folder)):
            raise ModelError(_lacks(source, absent))
        raise ModelError(
            f"In the checkpoint of model {source.name!r}, {name} has shape {tuple(stored)}, but its configuration asks "
            f"for {tuple(expected)}. {ADVICE}"
        )


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


def with_finite_numbers(settings: Any) -> Any:
    """The settings with texts ("inf", "-inf", "nan") for numbers that strict JSON can't express; others are unchanged."""
    if isinstance(settings, dict):
        return {key: with_finite_numbers(value) for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [with_finite_numbers(value) for value in settings]
    return str(settings) if isinstance(settings, float) and not math.isfinite(settings) else settings


def model_identity(source: ModelSource, config: Any) -> dict[str, Any]:
    """What tells this model from another: name, revision or weights, and the configuration's hash."""
    with loading_errors(source, "configuration"):
        settings = config.to_diff_dict()
    settings = {key: value for key, value in settings.items() if key != "transformers_version"}
    identity: dict[str, Any] = {"name": source.name, "config_sha256": fingerprint(with_finite_numbers(settings))}
    if quantised := quantisation(config):
        identity["quantisation"] = quantised
    if source.is_local:
        return {**identity, "weights_sha256": _weights_fingerprint(Path(source.path))}
    return {**identity, "revision": getattr(config, "_commit_hash", None) or source.revision}


def place_of(name: str, output: Path | str) -> str | None:
    """The folder of the model `name`, by the run.json of an `output` that was made with it; None where that says nothing."""
    if name == "demo" or "://" in str(output) or Path(name).is_dir():
        return None
    try:
        run = read_json(Path(output) / RUN_FILE)
    except FastcacheError:
        return None
    path = stored_path(run, name, Path(output))
    return str(path) if path.is_dir() else None


def known_model(identity: dict[str, Any], place: str | None, trust_remote_code: bool, what: str) -> ModelSource:
    """The model of this identity, at `place` or by its name; raises `MismatchError` where that is another than `what` is of."""
    place = place or place_of(identity["name"], what)
    source = ModelSource(place or identity["name"], identity.get("revision"), trust_remote_code)
    try:
        present = model_identity(source, load_config(source))
    except ModelError as error:
        raise ModelError(f"{error} Say where the model of {what} is with --model.") from error
    if found := differences({**identity, "name": ""}, {**present, "name": ""}):
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
