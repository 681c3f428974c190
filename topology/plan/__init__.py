"""A step before it is run: scheduled HLO read, priced on a slice as wired, and replayed."""
