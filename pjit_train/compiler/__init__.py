"""Training steps compiled for slices that are not there, by Google's compiler, in a subprocess."""
