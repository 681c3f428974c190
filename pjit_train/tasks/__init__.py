"""Tasks: what a run learns from its data, and how well it does."""
