"""extract: corpus -> tokens and token types -> LLM -> residuals -> cache."""
