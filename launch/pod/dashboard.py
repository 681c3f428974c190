"""Export of a run's metrics to Ray, which its dashboard and Prometheus read."""

from ray.util.metrics import Counter, Gauge

from launch.pod.events import AttemptBegun, AttemptFailed, Event, Step
from launch.pod.record import Record


def publish(record: Record) -> None:
    """Keeps the metrics torsion_step, _loss, _attempt and _failures up to date with the events."""
    step = Gauge("torsion_step", "the newest step that is computed")
    loss = Gauge("torsion_loss", "its loss")
    attempt = Gauge("torsion_attempt", "the number of the attempt")
    failures = Counter("torsion_failures", "failures that were found")

    def show(event: Event) -> None:
        match event:
            case Step():
                step.set(event.step)
                loss.set(event.loss)
            case AttemptBegun():
                attempt.set(event.attempt)
            case AttemptFailed():
                failures.inc()

    record.listeners.append(show)
