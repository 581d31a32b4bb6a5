"""Scores of samples: feature distances, paired metrics, and SQNR to the teacher."""
