"""Embedding tables spread over a mesh: exact, deduplicated lookups and updates of rows."""
