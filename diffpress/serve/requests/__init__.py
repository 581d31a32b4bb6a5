"""Bodies of requests, checked against a model, and samples as bytes."""
