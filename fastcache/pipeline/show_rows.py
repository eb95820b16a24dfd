"""What `prepare --show` prints: rows as they are read and as a model would see them, with the types of tokens in colour."""

import json
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from fastcache.cache_format.schema import ROLE_SHIFT, TokenType, TurnRole
from fastcache.corpus import CorpusRow
from fastcache.llm.chat import Rendered
from fastcache.pipeline.console import print_text, printable
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.prepare.preview import preview

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CHARACTERS = 2000
"""The most characters that are printed of a row as it is read, and of a run of tokens."""

STYLES = {
    "special": "bold red", "role word": "bold magenta", "template": "dim", "system": "green", "user": "cyan",
    "assistant": "yellow", "tool": "blue", "reasoning": "italic bright_black",
}  # fmt: skip


def show_rows(console: Console, config: PrepareConfig, n_rows: int) -> None:
    """Print the first `n_rows` of each source: as read, as the corpus has them, and with a model as it sees them."""
    rows, tokenizer = preview(config, n_rows)
    for shown in rows:
        print_text(console, f"\n{printable(shown.place).plain}")
        if shown.raw is not None:
            _print_part(console, "as read", Text(_cut(json.dumps(shown.raw, ensure_ascii=False, default=str))))
        if shown.row is None:
            _print_part(console, "not usable", Text(shown.problem))
            continue
        _print_fields(console, "kept beside", shown.kept)
        _print_fields(console, "not kept", shown.not_kept)
        if shown.rendered is not None and tokenizer is not None:
            _print_rendered(console, shown.rendered, tokenizer)
            continue
        if shown.problem:
            _print_part(console, "refused", Text(shown.problem))
        _print_corpus_row(console, shown.row)
    console.print()


def _cut(text: str) -> str:
    left_out = len(text) - MOST_CHARACTERS
    return text if left_out <= 0 else f"{text[:MOST_CHARACTERS]} ... and {left_out:,} characters more"


def _print_part(console: Console, title: str, content: Text) -> None:
    line = Text(f"{title}: ", "bold")
    console.print(line.append_text(printable(content.plain)), soft_wrap=True)


def _print_fields(console: Console, title: str, names: list[str]) -> None:
    if names:
        _print_part(console, title, Text(", ".join(names)))


def _print_corpus_row(console: Console, row: CorpusRow) -> None:
    """What the corpus would hold."""
    if row.text is not None:
        _print_part(console, "text", Text(_cut(row.text)))
    if row.tools is not None:
        _print_part(console, "tools", Text(_cut(json.dumps(row.tools, ensure_ascii=False))))
    for message in row.messages or ():
        fields = {name: value for name, value in message.items() if name not in ("role", "content")}
        beside = f" {_cut(json.dumps(fields, ensure_ascii=False))}" if fields else ""
        _print_part(console, message["role"], Text(_cut(message.get("content", "")) + beside))


def _print_rendered(console: Console, rendered: Rendered, tokenizer: "PreTrainedTokenizerBase") -> None:
    """The tokens by runs of one type: in colour on a terminal, a line each elsewhere."""
    runs = list(_runs(rendered, tokenizer))
    kinds = sorted({kind for kind, _, _ in runs}, key=list(STYLES).index)
    legend = Text(f"as rendered, {len(rendered.token_ids):,} tokens: ", "bold")
    for kind in kinds:
        legend.append(f"{kind} {sum(n for other, n, _ in runs if other == kind):,}  ", STYLES[kind])
    console.print(legend, soft_wrap=True)
    if console.is_terminal:
        line = Text()
        for kind, _, text in runs:
            line.append_text(printable(_cut(text), STYLES[kind]))
        console.print(line, soft_wrap=True)
        return
    for kind, n_tokens, text in runs:
        said = printable(json.dumps(_cut(text), ensure_ascii=False)).plain
        console.print(Text(f"  {kind:<10} {n_tokens:>5}  {said}"), soft_wrap=True)


def _runs(rendered: Rendered, tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[str, int, str]]:
    """Neighbouring tokens of one kind: the kind, how many there are, and their text."""
    kinds = [_kind(int(flags)) for flags in rendered.token_types]
    for kind, group in groupby(zip(kinds, rendered.token_ids.tolist(), strict=True), key=lambda pair: pair[0]):
        ids: list[Any] = [token for _, token in group]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield kind, len(ids), str(text)


def _kind(flags: int) -> str:
    """What a token is: of a content, whose."""
    if flags & TokenType.SPECIAL:
        return "special"
    if flags & TokenType.ROLE_WORD:
        return "role word"
    if flags & TokenType.TEMPLATE:
        return "template"
    return TurnRole(flags >> ROLE_SHIFT).name.lower()
