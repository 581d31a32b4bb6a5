"""Checkpoint in, bundle out: ONNX graph, Q/DQ, parity, engines, packaging. Needs torch and onnx."""
