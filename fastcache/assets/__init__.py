"""Where the demo model, its text, the paper's published values and the study files lie."""

from pathlib import Path

ASSETS = Path(__file__).parent
DEMO = ASSETS / "demo"
DEMO_CHAT = DEMO / "chat.jsonl.gz"
DEMO_TEXT = DEMO / "pretrain.jsonl.gz"

PAPER_MSE = ASSETS / "paper" / "mse.csv"

RECIPES = ASSETS / "recipes" if (ASSETS / "recipes").is_dir() else ASSETS.parents[1] / "recipes"
"""Study files: a wheel has them inside the package, a source tree at its top."""
