"""Distillation: train a student on a teacher, to recover from pruning or to need fewer evaluations.

recover      match the outputs and features of the model that was pruned
guidance     replace the two evaluations of classifier-free guidance with one
progressive  replace two steps of the teacher with one, repeatedly
trajectory   follow the teacher's fine trajectory in a few steps
consistency  map every point of a trajectory to the same image, in one or two evaluations
score        train a few-step generator with the difference of two scores

Each kind is one file with one function (checkpoint, config, ctx) -> checkpoint, and one entry in distill.KINDS.
"""
