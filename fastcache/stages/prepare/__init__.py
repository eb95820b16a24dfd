"""prepare: data sets -> one schema -> dedup -> permutation -> split -> a corpus directory."""
