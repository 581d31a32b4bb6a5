"""TensorRT: build engines from ONNX graphs, select one for this machine, and run it on an NVIDIA GPU.

engine     backend listed in diffpress.runtime.engines     engine_files    selects the engine file for a machine
library    tensorrt, tensorrt-rtx and cuda-python          compatibility   why an engine does not fit
builder    ONNX graph -> engine                            binding         buffers, stream and CUDA graph of one shape
options    build options                                   profile         shapes an engine is built for
messages   TensorRT errors as one line                     monitor         progress of a build
"""
