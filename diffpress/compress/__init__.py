"""Checkpoint in, smaller checkpoint out: schedule, prune, distill, quantize, evaluate. Needs torch."""
