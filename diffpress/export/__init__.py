"""Checkpoint in, bundle out: ONNX graph, Q/DQ, parity, engines, packaging. Needs torch and onnx.

The package is also a function, `diffpress.export(checkpoint, out, ...)`: see `diffpress.api.export`.
"""

from diffpress._callable import make_callable

make_callable(__name__)
