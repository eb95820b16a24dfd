"""Where the demo model and its text lie inside the package."""

from pathlib import Path

DEMO = Path(__file__).parent / "demo"
DEMO_CHAT = DEMO / "chat.jsonl.gz"
DEMO_TEXT = DEMO / "pretrain.jsonl.gz"
