"""The steer stage: generations with latents turned up, held or taken out, beside what the model says by itself."""

import json
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcache.config import as_dict
from fastcache.devices import choose_device
from fastcache.errors import InputError
from fastcache.extras import require_packages
from fastcache.files import append_to_log, read_json_lines, write_bytes_atomic
from fastcache.llm.backend import TokenIds
from fastcache.llm.chat import ChatRenderer
from fastcache.llm.loading import ModelSource, known_model, load_tokenizer, require_chat_template
from fastcache.progress import Progress
from fastcache.rundir import output_directory
from fastcache.sae.architectures import Sae
from fastcache.sae.storage import load_sae, sae_fingerprint
from fastcache.stages.steer.config import Setting, SteerConfig, settings_of
from fastcache.stages.steer.generators import open_generator
from fastcache.stages.steer.measures import repetition
from fastcache.text_files import read_text_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STEERING_FILE = "steering.jsonl"
FREE_ON_RESUME = ("model", "device", "sae")
"""Settings that may differ on resume: SAE and model go by what they are."""

Row = dict[str, Any]


def read_prompts(config: SteerConfig) -> list[str]:
    """The prompts, of the options and then of the file; raises `InputError` where there is none."""
    lines: list[str] = []
    if config.prompts:
        text = read_text_file(Path(config.prompts), "--prompts")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not (*config.prompt, *lines):
        raise InputError("Steering needs a prompt: --prompt TEXT, or --prompts FILE with one a line.")
    return [*config.prompt, *lines]


def steer(config: SteerConfig, out: Path, progress: Progress, fresh: bool = False) -> list[Row]:
    """Generate for every prompt and setting; writes `steering.jsonl` into `out`, line by line, and returns its rows.

    Raises `InputError` for a latent that the SAE doesn't have, `MismatchError` for another model than the SAE's.
    """
    prompts = read_prompts(config)
    if config.backend == "vllm":
        require_packages("--backend vllm", "vllm", "vllm")
    sae, info = load_sae(Path(config.sae), ("hook_point", "model", "model.name"))
    if missing := [latent for latent in config.latent if latent >= sae.d_sae]:
        raise InputError(f"--latent {missing[0]}: {config.sae} has latents 0 to {sae.d_sae - 1}.")
    source = known_model(info["model"], config.model, config.trust_remote_code, config.sae)
    device = choose_device(config.device)
    run = {**as_dict(config), "prompts": prompts, "sae_fingerprint": sae_fingerprint(Path(config.sae))}
    with output_directory(out, "steer", run, (STEERING_FILE,), free=FREE_ON_RESUME, fresh=fresh):
        path = out / STEERING_FILE
        done = {_key(row): row for row in read_json_lines(path)}
        write_bytes_atomic(path, "".join(map(_line, done.values())).encode())  # without a line that a killed run tore
        wanted = dict.fromkeys((number, each) for number in range(len(prompts)) for each in settings_of(config))
        todo = [each for each in wanted if each not in done]
        if todo:
            rows = _generated(config, sae, info["hook_point"], source, device, prompts, todo)
            with progress.task("steer", len(todo), "generations") as task, closing(rows):
                for row in rows:
                    append_to_log(path, _line(row).encode())
                    done[_key(row)] = row
                    task.advance(1)
        else:
            progress.say(f"{path} has all of them; nothing to do (--fresh starts over).")
    return [{**done[each], "prompt": prompts[each[0]]} for each in wanted]


def _generated(
    config: SteerConfig,
    sae: Sae,
    hook_point: str,
    source: ModelSource,
    device: str,
    prompts: list[str],
    todo: Iterable[tuple[int, Setting]],
) -> Generator[Row]:
    """A row for each prompt number and setting of `todo`: one setting after the other, its prompts as they are done."""
    tokenizer = load_tokenizer(source)
    require_chat_template(tokenizer, source)
    renderer = ChatRenderer(tokenizer, config.default_system, config.fold_system)
    ids = [_prompt_ids(tokenizer, prompt, config.system, renderer) for prompt in prompts]
    of_setting: dict[Setting, list[int]] = {}
    for number, setting in todo:
        of_setting.setdefault(setting, []).append(number)
    with closing(open_generator(config, sae, hook_point, source, device, ids)) as generate:
        for setting, numbers in of_setting.items():
            for said in generate([ids[number] for number in numbers], setting):
                yield {
                    "prompt": numbers[said.place],
                    "latents": list(setting.latents),
                    "alpha": setting.alpha,
                    "text": tokenizer.decode(said.token_ids.tolist(), skip_special_tokens=True),
                    "n_tokens": len(said.token_ids),
                    "ended": said.ended,
                    "repetition": repetition(said.token_ids),
                    "kl": said.kl,
                }


def _prompt_ids(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, system: str | None, renderer: ChatRenderer | None = None
) -> TokenIds:
    """The dialogue up to where the model's answer begins, as `extract` renders it; by default with its default settings."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    renderer = renderer or ChatRenderer(tokenizer)
    return renderer.render([*messages, {"role": "user", "content": prompt}], generation_prompt=True).token_ids


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _key(row: Row) -> tuple[int, Setting]:
    return row["prompt"], Setting(tuple(row["latents"]), row["alpha"])
