"""Target sampler: a whole sampling run as one ONNX graph, from noise and conditioning to images."""
