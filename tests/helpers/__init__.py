"""What several test modules use: models, configurations, references, processes."""
