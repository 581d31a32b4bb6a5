"""ONNX graphs: tracing a torch module, holding large weights, rewriting nodes."""
