"""Makes fastcache/assets/paper/mse.csv, the FAST paper's published MSE, from its tables as tidy CSV.

python tools/make_paper_table.py --tables ../shared/paper_tables --out fastcache/assets/paper/mse.csv
"""

import argparse
import csv
from pathlib import Path

SOURCE = (
    "arXiv 2506.07691, tables D.2 to D.7: log2 of MSE (equation 7) on 5,000 held-out dialogues, all and special tokens"
)
METHODS = {"FAST": "fast", "BT(F)": "bt-f", "BT(P)": "bt-p"}


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with (given.tables / "mse_all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", newline="") as file:
        file.write(f"# {SOURCE}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("model", "layer", "expansion", "method", "architecture", "log2_mse", "log2_mse_special"))
        for row in rows:
            described = row["model"], row["layer"], row["expansion"], METHODS[row["method"]], row["arch"]
            writer.writerow((*described, row["mse_log"], row["mse_st_log"]))


if __name__ == "__main__":
    main()
