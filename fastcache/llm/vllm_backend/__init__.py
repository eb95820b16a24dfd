"""Residuals through vLLM. Nothing outside this package imports vllm; its modules import it when a model is opened."""
