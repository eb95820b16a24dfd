"""Finding the file of a study or sweep: where the user says, or among those that come with fastcache, by name."""

from pathlib import Path

from fastcache.assets import RECIPES
from fastcache.config import nearest
from fastcache.errors import InputError, quoted
from fastcache.text_files import require_regular_file


def included_studies() -> dict[str, Path]:
    """The study files that come with fastcache, by name: demo-study, qwen2.5-7b-instruct and so on."""
    return {path.name.removesuffix(".yaml"): path for path in sorted(RECIPES.glob("*/*.yaml"))}


def find_study_file(text: str, what: str = "--config") -> Path:
    """The file that `text` names: one that is there, or else an included study, with or without its folder and .yaml.

    `what` is how messages call it, such as the option. Raises `InputError` where there is neither, or no regular file.
    """
    path = Path(text)
    try:
        is_there = path.exists() or path.is_symlink()
    except (OSError, ValueError):  # a name that the system can't look up
        is_there = True
    if not is_there:
        studies = included_studies()
        name = path.name.removesuffix(".yaml")
        parts = path.parts[1:] if path.parts[:1] == ("recipes",) else path.parts
        if name in studies and parts[:-1] in ((), studies[name].parts[-2:-1]):
            return studies[name]
        hint = nearest(name, studies) or f" Studies that come with fastcache are {', '.join(studies)}."
        raise InputError(f"{what} {quoted(text)}: there is no such file, and no such study.{hint}")
    require_regular_file(path, what)
    return path
