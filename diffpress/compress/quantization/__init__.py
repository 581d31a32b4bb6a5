"""Quantization: float checkpoint in, the same weights with scales as data out.

stage         the stage itself, on one screen
formats       int8, fp8, int4, ...: which numbers weights and activations are rounded to
layers        which layer gets which format
weight_scales one scale for an output channel of a weight, or for a block of its inputs
quantizers    nvidia-modelopt's quantizers put into a model, and taken out as data
nvfp4         4-bit floats in torch, as a backend of those
calibration   every amax, weights' and activations', and what smooths which layer
trajectory    the model samples by its own plan and is watched; resumable
statistics    what is remembered of a tensor that streams by
amax          max, percentile, mse, entropy, step_means: a limit read from that
smooth        magnitude moved from activations into weights, by channel or by the halves of a join
trunk         the sums that blocks end in on integers, and one scale for what is joined
wiring        which layers read the same tensor, and which a concatenation
correction    what rounding does to the output on the average, step by step
sensitivity   what rounding each place costs in output SQNR
mixed         places returned to float until the stage's bounds are kept
states        states of a trajectory, to learn from
layer_rows    what one layer multiplies, as rows of a matrix
rounding      every weight up or down, by what that does to the layer's output
awq           finer steps for the input channels that matter, under 4-bit weights
low_rank      a float branch beside a rounded layer
qat           training through the quantizers
updates       what training changes: all parameters, or factors of low rank
"""
