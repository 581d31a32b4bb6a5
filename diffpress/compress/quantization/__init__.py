"""Quantization: takes a float checkpoint, returns the same weights with scales as data.

quantize              the stage
formats               int8, fp8, int4, ...: the number formats of weights and activations
layer_selection       the format of every layer
layer_graph           layers that share an input, and layers that read a concatenation
unified_scales        one scale for all tensors of a concatenation
quantizers            nvidia-modelopt's fake quantizers in a model
nvfp4                 4-bit floats in torch, as a backend of these quantizers
trajectory_dataset    network inputs recorded while sampling

calibration/
    calibrate         the amax of every quantizer, and the smoothing vectors
    observer          samples the model with activation observers; resumable
    statistics        streaming histogram of a tensor's magnitudes
    clip_range        max, percentile, mse, entropy, step_means: amax from these statistics
    weight_scales     one scale per output channel of a weight, or per block of its inputs
algorithms/
    smoothquant       moves magnitude from activations into weights, per channel or per concatenated tensor
    awq               scales the input channels of 4-bit weights
    svdquant          float low-rank branch beside a quantized layer
    gptq              rounds every weight up or down to minimize the error of the layer's output
    layer_rows        the inputs of one layer as rows of a matrix
    sensitivity       output noise caused by quantizing each layer
    mixed_precision   returns layers to float until the stage's bounds hold
    output_correction mean quantization error of the output, per timestep (PTQD)
    qat               training through the fake quantizers
    qat_updates       what QAT trains: all parameters, or low-rank factors
"""
