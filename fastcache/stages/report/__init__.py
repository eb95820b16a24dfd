"""report: evaluated runs -> one self-contained HTML page."""
