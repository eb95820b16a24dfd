"""A page to browse latents: one HTML file, with data beside it that is loaded when it is looked at."""
