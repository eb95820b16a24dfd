"""Fast training steps: the same mathematics as the architectures', with fewer passes and, where it pays, fewer products.

`step.py` has the five dense products; `dense_kernels.py` what lies between them, compiled; `sparse_kernels.py` all but the
first product, on the active latents alone; `adam.py` the optimiser in one pass; `gpu.py` and `triton_kernels.py` passes and
optimiser on a GPU; `products.py` has the rule for the way to multiply, and `cpu.py` knows the CPU. Nothing here is needed:
`--plain` trains with the architectures' own `loss_and_grads`, and torch's own Adam.
"""
