"""Where the demo model, its text, and the paper's published values lie inside the package."""

from pathlib import Path

DEMO = Path(__file__).parent / "demo"
DEMO_CHAT = DEMO / "chat.jsonl.gz"
DEMO_TEXT = DEMO / "pretrain.jsonl.gz"

PAPER_MSE = Path(__file__).parent / "paper" / "mse.csv"
