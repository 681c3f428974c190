"""All-to-all on a torus: throughput and its bounds, routes, deadlock, packets."""
