"""Checkpoint in, smaller checkpoint out: schedule, prune, distill, quantize, evaluate. Needs torch.

The package is also a function, `diffpress.compress(model, stages, out=...)`: see `diffpress.api.compress`.
"""

from diffpress._callable import make_callable

make_callable(__name__)
