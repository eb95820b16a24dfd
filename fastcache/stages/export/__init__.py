"""export: a trained SAE -> the files of another library."""
