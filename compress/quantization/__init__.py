"""Quantization: float checkpoint in, the same weights with scales as data out.

stage         the stage itself, on one screen
formats       int8, fp8, int4, ...: which numbers weights and activations are rounded to
layers        which layer gets which format
quantizers    nvidia-modelopt's quantizers put into a model, and taken out as data
calibration   activation statistics, streamed while the model samples by its own plan
qat           training through the quantizers
"""
