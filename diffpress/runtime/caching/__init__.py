"""Step caching: steps of a sampling plan that reuse what earlier steps computed."""
