"""Fail if a wheel would put any top-level module but `fastcache` on a user's path, or lacks a file that is needed.

python tools/check_wheel.py dist/fastcache_sae-*.whl
"""

import sys
import zipfile
from pathlib import Path

LIMIT_BYTES = 12_000_000
ROOT = Path(__file__).parents[1]
NEEDED = {
    "README.md",
    "model.safetensors",
    "chat.jsonl.gz",
    "page.js",
    "page.html.j2",
    "report.html.j2",
    "scores.html.j2",
}
"""Names of files that commands read; the study files of `recipes/` besides."""


def main() -> None:
    for path in sys.argv[1:]:
        with zipfile.ZipFile(path) as wheel:
            names = wheel.namelist()
            size = sum(info.compress_size for info in wheel.infolist())
        tops = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
        if tops != {"fastcache"}:
            sys.exit(f"{path} contains the top-level names {sorted(tops)}; expected only fastcache.")
        missing = NEEDED - {name.rpartition("/")[2] for name in names}
        recipes = (path.relative_to(ROOT).as_posix() for path in ROOT.glob("recipes/*/*.yaml"))
        missing |= {recipe for recipe in recipes if f"fastcache/assets/{recipe}" not in names}
        if missing or size > LIMIT_BYTES:
            sys.exit(f"{path}: missing {sorted(missing)}, {size} bytes of at most {LIMIT_BYTES}.")
        print(f"{path}: only fastcache, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
