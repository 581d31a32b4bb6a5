"""TensorRT: plans are built from a graph, told apart by what they fit, and run on an NVIDIA GPU.

engine     the backend that diffpress.runtime.engines lists          plans     which plan a machine takes
library    tensorrt, tensorrt-rtx and cuda-python          fit       why a plan does not fit
builder    a graph in, a plan out                          binding   buffers, stream and CUDA graph of one shape
options    what a build may be asked for                   profile   the shapes that a plan is made for
messages   what TensorRT says, in one line                 monitor   a progress bar while it builds
"""
