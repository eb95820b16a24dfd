"""Fail if a wheel would put any top-level module but `fastcache` on a user's path.

python tools/check_wheel.py dist/fastcache_sae-*.whl
"""

import sys
import zipfile

LIMIT_BYTES = 12_000_000
NEEDED = {"README.md", "model.safetensors", "chat.jsonl.gz", "page.js", "report.html.j2", "scores.html.j2"}


def main() -> None:
    for path in sys.argv[1:]:
        with zipfile.ZipFile(path) as wheel:
            names = wheel.namelist()
            size = sum(info.compress_size for info in wheel.infolist())
        tops = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
        if tops != {"fastcache"}:
            sys.exit(f"{path} contains the top-level names {sorted(tops)}; expected only fastcache.")
        missing = {"README.md", "model.safetensors", "chat.jsonl.gz", "page.js", "scores.html.j2"} - {
            n.rpartition("/")[2] for n in names
        }
        if missing or size > LIMIT_BYTES:
            sys.exit(f"{path}: missing {sorted(missing)}, {size} bytes of at most {LIMIT_BYTES}.")
        print(f"{path}: only fastcache, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
