"""train: cache -> shuffled units -> mixing buffer -> an SAE."""
