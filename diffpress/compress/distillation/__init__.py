"""Distillation: a student learns from a teacher what pruning took, or to need fewer calls of the network.

recover      outputs and features of the model it was pruned from
guidance     one call in the place of guidance's two
progressive  one step in the place of the teacher's two, again and again
trajectory   a few steps that keep to the teacher's fine trajectory
consistency  every point of a trajectory to the same image, in one or two calls
score        a generator of few steps, moved by the difference of two scores

Each kind is a file with one function (checkpoint, its settings, ctx) -> checkpoint, and a line in stage.KINDS.
"""
