"""Seeds of the noise that the stages sample with: sample i of a purpose starts from the noise of its seed + i.

The ranges are disjoint: no stage trains, calibrates or searches on the noise that another one, an evaluation or a user
(seeds 0, 1, ...) samples with. Each has room for a million samples, evaluation for ten million per draw.
"""

from __future__ import annotations

CALIBRATION_SEED = 1_000_000  # trajectories that quantization calibrates and trains on
TEACHER_DATA_SEED = 2_000_000  # samples of the teacher that replace training images
DISTILLATION_SEED = 4_000_000  # trajectories of the teacher that a student is distilled from
OUTPUT_CORRECTION_SEED = 5_000_000  # samples that the mean quantization error is measured on
SEARCH_SEED = 7_000_000  # samples that a schedule search compares
SELECTION_SEED = 8_000_000  # samples that the trials of a recipe search are compared by
EVALUATION_SEED = 10_000_000  # times 1, 2, ... for the draws of an evaluation
SELECTION_DRAW = 999  # of an evaluation that selects; those that report are 0, 1, ...
