"""The inside of a chip: arrays, memories, workloads, and attention's dataflows by FLAT."""
