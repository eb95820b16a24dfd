"""evaluate: SAEs + held-out cache -> reconstruction by token set, L0, dead latents."""
