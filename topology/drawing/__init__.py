"""Pages and pictures of slices and pods."""
