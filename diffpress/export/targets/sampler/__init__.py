"""Target sampler: a whole sampling run as one ONNX graph, from noise and conditioning to images.

block         builds graphs: operators, constants, other graphs inside
conditioning  labels, tokens or tensors -> the denoiser's inputs that are constant over all steps
plan_loop     the sampling plan as a Loop over the coefficients of a fused program
images        samples -> decoder -> images in [0, 1]
supported     what cannot be written this way, and is refused
build         all of it in one graph
description   sampler.json, which tells a client what to feed
verify        the same images as the runtime's, step by step
target        the target of the export
"""
