"""Failures over months: availability, checkpoint intervals, policies, a pod's simulated years."""
