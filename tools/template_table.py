"""Writes docs/templates.md: what each chat template does with dialogues of many shapes, or its own words of refusal.

    python tools/template_table.py FOLDER_OF_TEMPLATES --out docs/templates.md

Templates are `*.jinja`. Each is rendered with the demo's tokenizer and the special tokens that it writes, once alone and
once with definitions of tools; the token ids are compared with those of transformers.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from shapes import SHAPES, TOOLS, tokenizer_for

from fastcache.errors import FastcacheError
from fastcache.llm.chat import ChatRenderer
from fastcache.llm.template import pinned_date

HEAD = """# Chat templates

Published chat templates with {n} dialogues each: {shapes}; each with and without definitions of tools. Made by
`python tools/template_table.py FOLDER --out docs/templates.md`.

*Exact* are dialogues that have the token ids of transformers' `apply_chat_template` on the fixed date. *Fitted* are those
that were changed so that the template takes them, such as tool arguments passed as an object instead of text; they have
the ids of the changed dialogue. Everything else was refused by the template, in the words of the last column.

| template | exact | fitted | refused | what the template leaves out | its refusals |
|---|---|---|---|---|---|
"""


def row(path: Path) -> str:
    tokenizer = tokenizer_for(path.read_text())
    renderer = ChatRenderer(tokenizer)
    counts = dict.fromkeys(("exact", "fitted", "refused"), 0)
    reasons: dict[str, int] = {}
    left_out: set[str] = set()
    for messages in SHAPES.values():
        for tools in (None, TOOLS):
            try:
                rendered = renderer.render(messages, tools)
            except FastcacheError as error:
                reason = str(getattr(error, "reason", error))
                reasons[reason] = reasons.get(reason, 0) + 1
                counts["refused"] += 1
                continue
            left_out |= rendered.left_out.keys()
            if rendered.changes:
                counts["fitted"] += 1
                continue
            ids = tokenizer.apply_chat_template(
                messages, tools=tools, return_dict=False, chat_template=pinned_date(tokenizer.chat_template)
            )
            if ids != rendered.token_ids.tolist():
                raise SystemExit(f"{path.name}: other ids than transformers")
            counts["exact"] += 1
    words = "; ".join(f"{reason} ({n})" for reason, n in sorted(reasons.items()))
    cells = [path.stem, *map(str, counts.values()), ", ".join(sorted(left_out)), words]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = [row(path) for path in sorted(options.folder.glob("*.jinja"))]
    head = HEAD.format(n=2 * len(SHAPES), shapes=", ".join(SHAPES))
    options.out.write_text(head + "".join(rows))


if __name__ == "__main__":
    main()
