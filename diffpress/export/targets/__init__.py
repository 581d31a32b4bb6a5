"""What differs between deployment targets: supported formats, variants, TensorRT engines, pipeline folders."""
