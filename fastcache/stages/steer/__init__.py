"""steer: SAE, latents and prompts -> generations, and latents of special tokens."""
