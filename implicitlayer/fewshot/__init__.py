"""Few-shot data and networks."""
