"""The models: blocks, their parameters and matmuls, the transformers made of them, the loss."""
