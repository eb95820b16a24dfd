"""OpenAssistant's trees of replies: of each tree the best path becomes a dialogue."""

from typing import Any


def _votes(node: dict[str, Any]) -> float:
    """Votes for a reply: OpenAssistant's emojis, as an object or in columns."""
    emojis = node.get("emojis")
    if isinstance(emojis, dict) and isinstance(emojis.get("name"), list) and isinstance(emojis.get("count"), list):
        emojis = dict(zip(emojis["name"], emojis["count"], strict=False))
    counts = emojis if isinstance(emojis, dict) else {}
    up, down = (counts.get(sign) for sign in ("+1", "-1"))
    return (up if isinstance(up, int | float) else 0) - (down if isinstance(down, int | float) else 0)


def _order(reply: dict[str, Any]) -> tuple[bool, float, float]:
    rank = reply.get("rank")
    return bool(reply.get("deleted")), rank if isinstance(rank, int | float) else float("inf"), -_votes(reply)


def best_reply(replies: list[dict[str, Any]]) -> dict[str, Any]:
    """The reply of the lowest rank, then the one with the most votes; deleted ones come last."""
    return min(replies, key=_order)


def best_path(root: dict[str, Any], where: str, not_kept: set[str]) -> list[dict[str, Any]]:
    """The turns along a tree of replies, of several the best; where others are left out, `where.replies` is added to
    `not_kept`."""
    turns, node = [], root
    while True:
        turns.append({name: value for name, value in node.items() if name != "replies"})
        listed = node.get("replies")
        replies = [reply for reply in listed if isinstance(reply, dict)] if isinstance(listed, list) else []
        if len(replies) > 1:
            not_kept.add(f"{where}.replies")
        if not replies:
            return turns
        node = best_reply(replies)
