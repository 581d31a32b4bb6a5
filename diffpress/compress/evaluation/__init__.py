"""Evaluation: feature distances and paired metrics of samples, SQNR to the teacher, benchmarks."""
