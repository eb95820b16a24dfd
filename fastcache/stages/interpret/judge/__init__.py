"""A language model's opinion of latents: the paper's score and name, and how well the name finds the latent's contexts."""
