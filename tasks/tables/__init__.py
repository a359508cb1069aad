"""Tables of scores: ours, and ours beside published ones."""
