"""Text that every Python carries: a pretraining-like corpus and a chat corpus made from the standard library.

Both are rebuilt from the running interpreter's own docstrings, signatures and language reference
(Python Software Foundation License), so they can be shipped and reproduced without any network.
"""

import ast
import inspect
import random
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo", "ensurepip"}
EMAIL = re.compile(r"<?[\w.+-]+@[\w-]+\.[\w.-]+>?")
MAX_ANSWER_CHARS = 900


@dataclass(frozen=True)
class Entry:
    """One documented object of the standard library."""

    module: str
    name: str
    kind: str  # "module", "class", "function" or "method"
    signature: str
    doc: str
    source: str


def clean(text: str) -> str:
    """Dedent, drop e-mail addresses and trailing blanks."""
    text = EMAIL.sub("", inspect.cleandoc(text))
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def _signature(node: ast.AST) -> str:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return f"{node.name}({ast.unparse(node.args)})"
    return ""


def _entries_of(module: str, path: Path) -> Iterator[Entry]:
    text = path.read_text(encoding="utf-8", errors="ignore")
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.splitlines()

    def visit(node: ast.AST, prefix: str, in_class: bool) -> Iterator[Entry]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            doc = clean(ast.get_docstring(child) or "")
            is_class = isinstance(child, ast.ClassDef)
            name = f"{prefix}.{child.name}" if prefix else child.name
            if doc and not child.name.startswith("_"):
                kind = "class" if is_class else "method" if in_class else "function"
                source = textwrap.dedent("\n".join(lines[child.lineno - 1 : child.end_lineno]))
                yield Entry(module, name, kind, _signature(child), doc, EMAIL.sub("", source))
            if is_class:
                yield from visit(child, name, in_class=True)

    if doc := clean(ast.get_docstring(tree) or ""):
        yield Entry(module, module, "module", "", doc, "")
    yield from visit(tree, "", in_class=False)


def library_entries() -> list[Entry]:
    """All documented public objects of the pure-Python standard library, in path order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    entries: list[Entry] = []
    for path in sorted(root.rglob("*.py"), key=lambda path: (path.parent, path.name)):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and (not path.name.startswith("_") or path.stem == "__init__"):
            entries += _entries_of(".".join(relative.with_suffix("").parts).removesuffix(".__init__"), path)
    return entries


def pretraining_documents(entries: list[Entry], max_chars: int) -> list[dict[str, str]]:
    """Documents like `{"text", "source"}`: language reference topics, module references and code."""
    from pydoc_data.topics import topics

    documents = [{"text": clean(text), "source": f"topic:{name}"} for name, text in sorted(topics.items())]
    by_module: dict[str, list[Entry]] = {}
    for entry in entries:
        by_module.setdefault(entry.module, []).append(entry)
    for module, members in sorted(by_module.items()):
        parts = []
        for entry in members:
            title = entry.signature or entry.name
            parts.append(f"{entry.kind} {title}\n\n{textwrap.indent(entry.doc, '    ')}")
        documents.append({"text": f"Module {module}\n\n" + "\n\n".join(parts), "source": f"module:{module}"})
        code = "\n\n".join(entry.source for entry in members if entry.kind == "function" and len(entry.source) < 2500)
        if len(code) > 400:
            documents.append({"text": code, "source": f"code:{module}"})
    random.Random(42).shuffle(documents)
    kept, total = [], 0
    for document in documents:
        kept.append(document)
        total += len(document["text"])
        if total > max_chars:
            break
    return kept


WHAT = (
    "What does {subject} do?",
    "Can you explain {subject}?",
    "How do I use {subject}?",
    "Tell me about {subject}.",
    "I found {subject} in some code. What is it for?",
    "Please describe {subject} briefly.",
    "what is {subject}",
)
MORE = ("Is there more to know about it?", "Please go on.", "Can you give me the details?", "And the rest?")
WHERE = ("Which module is it in?", "Where do I import it from?", "Where does it live?")
CALL = ("How is it called?", "What is its signature?", "Which arguments does it take?")
CODE = ("Can you show me the source code?", "What does the implementation look like?", "Show me the code, please.")
THANKS = ("Thanks!", "Great, thank you.", "That helps, thanks.")
WELCOME = ("You are welcome.", "Happy to help!", "Any time. Ask me if anything else is unclear.")
SYSTEM = (
    "You are a helpful assistant.",
    "You answer questions about Python's standard library.",
    "You are a Python tutor. Keep answers short.",
)


def _subject(entry: Entry, rng: random.Random) -> str:
    if entry.kind == "module":
        return f"the module {entry.module}" if rng.random() < 0.7 else f"`import {entry.module}`"
    full = f"{entry.module}.{entry.name}"
    return rng.choice((f"{full}", f"`{full}`", f"the {entry.kind} {full}", f"{entry.name} from {entry.module}"))


def _paragraphs(doc: str) -> tuple[str, str]:
    first, _, rest = doc.partition("\n\n")
    return first[:MAX_ANSWER_CHARS], rest[:MAX_ANSWER_CHARS]


def _dialogue(entry: Entry, rng: random.Random) -> list[dict[str, str]]:
    """A dialogue of one to four exchanges about `entry`."""
    messages: list[dict[str, str]] = []

    def exchange(question: str, answer: str) -> None:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})

    if rng.random() < 0.25:
        messages.append({"role": "system", "content": rng.choice(SYSTEM)})
    first, rest = _paragraphs(entry.doc)
    exchange(rng.choice(WHAT).format(subject=_subject(entry, rng)), first)
    follow_ups = []
    if rest:
        follow_ups.append((rng.choice(MORE), rest))
    if entry.kind != "module":
        follow_ups.append((rng.choice(WHERE), f"It is in the module {entry.module}: `import {entry.module}`."))
    if entry.signature:
        follow_ups.append((rng.choice(CALL), f"```python\n{entry.signature}\n```"))
    if 0 < len(entry.source) < MAX_ANSWER_CHARS and entry.kind == "function":
        follow_ups.append((rng.choice(CODE), f"```python\n{entry.source}\n```"))
    rng.shuffle(follow_ups)
    for question, answer in follow_ups[: rng.choice((0, 1, 1, 2, 3))]:
        exchange(question, answer)
    if rng.random() < 0.1:
        exchange(rng.choice(THANKS), rng.choice(WELCOME))
    return messages


def chat_dialogues(entries: list[Entry], near_duplicate_share: float = 0.08) -> list[dict[str, object]]:
    """Dialogues `{"id", "messages", "source"}`; a share of them repeats an entry in other words, for dedup to find."""
    rng = random.Random(42)
    dialogues: list[dict[str, object]] = []
    for entry in entries:
        n_times = 2 if rng.random() < near_duplicate_share else 1
        for _ in range(n_times):
            messages = _dialogue(entry, rng)
            dialogues.append({"messages": messages, "source": f"stdlib-{entry.kind}"})
    rng.shuffle(dialogues)
    for index, dialogue in enumerate(dialogues):
        dialogue["id"] = f"demo-{index:05d}"
    return dialogues
