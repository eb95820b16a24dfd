"""The steer stage: generations with latents turned up, held or taken out, beside what the model says by itself."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastcache.config import as_dict
from fastcache.devices import choose_device, default_dtype
from fastcache.errors import InputError
from fastcache.files import fingerprint, read_json_lines, require_fields, write_bytes_atomic
from fastcache.llm.backend import TokenIds
from fastcache.llm.loading import ModelSource, known_model, load_tokenizer, require_chat_template
from fastcache.llm.splicing import SplicedModel
from fastcache.llm.transformers_backend import DTYPES
from fastcache.progress import Progress
from fastcache.rundir import output_directory
from fastcache.sae.architectures import Sae
from fastcache.sae.storage import INFO_FILE, load_sae
from fastcache.stages.steer.config import SteerConfig
from fastcache.stages.steer.interventions import make
from fastcache.stages.steer.measures import mean_kl, repetition

STEERING_FILE = "steering.jsonl"
FREE_ON_RESUME = ("model", "device", "sae")
"""Settings that may differ on resume: SAE and model go by what they are."""

Row = dict[str, Any]


class Setting(NamedTuple):
    """What is generated with; no latents is the model by itself."""

    latents: tuple[int, ...]
    alpha: float | None


def read_prompts(config: SteerConfig) -> list[str]:
    """The prompts, of the options and then of the file; raises `InputError` where there is none."""
    lines: list[str] = []
    if config.prompts:
        path = Path(config.prompts)
        if not path.is_file():
            raise InputError(f"--prompts {path}: there is no such file.")
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    if not (*config.prompt, *lines):
        raise InputError("Steering needs a prompt: --prompt TEXT, or --prompts FILE with one a line.")
    return [*config.prompt, *lines]


def settings_of(config: SteerConfig) -> list[Setting]:
    """The model by itself, then every latent, or all together, with every strength."""
    groups = [config.latent] if config.together else [(latent,) for latent in config.latent]
    alphas = (None,) if config.mode == "ablate" else config.alpha
    return [Setting((), None), *(Setting(latents, alpha) for latents in groups for alpha in alphas)]


def steer(config: SteerConfig, out: Path, progress: Progress, fresh: bool = False) -> list[Row]:
    """Generate for every prompt and setting; writes `steering.jsonl` into `out`, line by line, and returns its rows.

    Raises `InputError` for a latent that the SAE doesn't have, `MismatchError` for another model than the SAE's.
    """
    prompts = read_prompts(config)
    sae, info = load_sae(Path(config.sae))
    require_fields(info, {"hook_point": str, "model": dict}, Path(config.sae) / INFO_FILE)
    if missing := [latent for latent in config.latent if latent >= sae.d_sae]:
        raise InputError(f"--latent {missing[0]}: {config.sae} has latents 0 to {sae.d_sae - 1}.")
    source = known_model(info["model"], config.model, config.trust_remote_code, config.sae)
    device = choose_device(config.device)
    run = {**as_dict(config), "prompts": prompts, "sae_fingerprint": fingerprint(info)}
    with output_directory(out, "steer", run, (STEERING_FILE,), free=FREE_ON_RESUME, fresh=fresh):
        path = out / STEERING_FILE
        done = {_key(row): row for row in read_json_lines(path)}
        write_bytes_atomic(path, "".join(map(_line, done.values())).encode())  # without a line that a killed run tore
        wanted = [(number, setting) for number in range(len(prompts)) for setting in settings_of(config)]
        todo = [each for each in wanted if each not in done]
        if todo:
            generate = Generator(config, sae.to(device), info["hook_point"], source, device)
            with progress.task("steer", len(todo), "generations") as task, path.open("a") as file:
                for number, setting in todo:
                    row = {"prompt": number, "latents": list(setting.latents), "alpha": setting.alpha}
                    row |= generate(prompts[number], setting)
                    file.write(_line(row))
                    file.flush()
                    done[number, setting] = row
                    task.advance(1)
        else:
            progress.say(f"{path} has all of them; nothing to do (--fresh starts over).")
    return [{**done[each], "prompt": prompts[each[0]]} for each in wanted]


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _key(row: Row) -> tuple[int, Setting]:
    return row["prompt"], Setting(tuple(row["latents"]), row["alpha"])


class Generator:
    """The model, its tokenizer and the SAE."""

    def __init__(self, config: SteerConfig, sae: Sae, hook_point: str, source: ModelSource, device: str) -> None:
        """Load the model; raises `ModelError` for one that can't be loaded or has no chat template."""
        self._config, self._sae, self._hook_point = config, sae, hook_point
        self._tokenizer = load_tokenizer(source)
        require_chat_template(self._tokenizer, source)
        dtype = config.model_dtype or default_dtype(device)
        self._model = SplicedModel(source, [hook_point], DTYPES[dtype], device)

    def __call__(self, prompt: str, setting: Setting) -> Row:
        """What is said to the prompt, and its figures; KL is from the model by itself, on the same tokens."""
        config, ids = self._config, self._prompt_ids(prompt)
        first = 0 if config.positions == "all" else len(ids)
        splice = None
        if setting.latents:
            splice = self._hook_point, make(self._sae, config.mode, setting.latents, setting.alpha or 0.0)
        said = self._model.generate(ids, config.max_new_tokens, splice, first, config.temperature, config.seed)
        both, where = np.concatenate([ids, said]), slice(len(ids) - 1, len(ids) + len(said) - 1)
        plain = self._model.log_probs(both)[where]
        changed = self._model.log_probs(both, splice, first)[where] if splice else plain
        return {
            "text": self._tokenizer.decode(said.tolist(), skip_special_tokens=True),
            "n_tokens": len(said),
            "ended": bool(len(said)) and self._model.ends_turn(int(said[-1])),
            "repetition": repetition(said),
            "kl": mean_kl(changed, plain),
        }

    def _prompt_ids(self, prompt: str) -> TokenIds:
        system = [] if self._config.system is None else [{"role": "system", "content": self._config.system}]
        messages = [*system, {"role": "user", "content": prompt}]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
