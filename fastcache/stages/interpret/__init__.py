"""interpret: SAE and held-out cache -> what each latent is active on."""
