"""The arithmetic of masks: N:M, top-k, packing, validity."""
