"""Number formats: their values, their bytes, and matmuls in them."""
