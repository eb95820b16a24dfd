"""OpenAssistant's other form: a table with a message in each row, which names the message that it replies to."""

from collections.abc import Iterable, Iterator
from typing import Any

from fastcache.stages.prepare.blocks import Malformed, Row
from fastcache.stages.prepare.spellings import TREE_FIELDS
from fastcache.stages.prepare.trees import best_reply

OTHER_REPLIES = "replies off the best path"
"""The column in which a dialogue has how many messages of its tree it leaves out."""


def is_message_of_tree(row: Row | Malformed) -> bool:
    """Whether a row is a message of such a table."""
    return isinstance(row, dict) and all(name in row for name in TREE_FIELDS)


def dialogues_of_table(rows: Iterable[Row | Malformed], path: str) -> Iterator[Row | Malformed]:
    """A row with the best path of each tree, in the order of the first messages; all of the table is held in memory.

    What is no such message, and what replies to none that a first message leads to, is `Malformed`.
    """
    messages: dict[Any, tuple[Row, str]] = {}
    replies: dict[Any, list[Any]] = {}
    for number, row in enumerate(rows):
        name = row["message_id"] if isinstance(row, dict) and is_message_of_tree(row) else None
        if isinstance(row, Malformed) or not isinstance(name, str | int) or name in messages:
            yield row if isinstance(row, Malformed) else Malformed("no message of a tree", f"{path}, row {number}")
            continue
        messages[name] = row, f"{path}, row {number}"
        parent = row["parent_id"]
        replies.setdefault(parent if isinstance(parent, str | int) else None, []).append(name)
    reached: set[Any] = set()
    for root in replies.pop(None, []):
        tree = _below(root, replies)
        reached.update(tree)
        turns, names = [], [root]
        while names:
            turns.append(best_reply([messages[name][0] for name in names]))
            names = replies.get(turns[-1]["message_id"], [])
        yield {"messages": turns, OTHER_REPLIES: len(tree) - len(turns) or None}
    for name, (_, place) in messages.items():
        if name not in reached:
            yield Malformed("reply to a message that isn't there", place)


def _below(root: Any, replies: dict[Any, list[Any]]) -> list[Any]:
    """The messages of a tree."""
    tree = [root]
    for name in tree:  # which grows
        tree += replies.get(name, [])
    return tree
