"""The torus of a slice: shapes, boxes, twists, distances, bisections."""
