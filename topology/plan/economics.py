"""The cost of a long run: days, the failures among them, chip-hours and energy."""

import math
from dataclasses import dataclass

from topology.fleet.checkpoint_interval import best_interval, efficiency
from topology.fleet.progress import ASSUMED_COSTS, Costs
from topology.fleet.workload import DAY, FailureRates
from topology.numbers import number, whole
from topology.torus.slices import Slice

HOUR = 3600.0


@dataclass(frozen=True)
class Site:
    """Data centre.

    Attributes:
      pue: energy that it takes over that of its computers (power usage effectiveness).
      kg_per_kwh: kilograms of CO2e of its electricity, in operation.
    """

    name: str
    pue: float
    kg_per_kwh: float

    def tonnes(self, joules: float) -> float:
        """Tonnes of CO2e of so much energy of computers."""
        return self.pue * joules / 3.6e6 * self.kg_per_kwh / 1000


# Jouppi et al., TPU v4 (ISCA 2023), section 7.6: Google's PUE, and its electricity in Oklahoma
# after hour by hour purchases of renewable energy; the averages of the world.
GOOGLE_OKLAHOMA = Site("Google's data centre in Oklahoma", 1.10, 0.074)
AVERAGE_SITE = Site("an average data centre", 1.57, 0.475)


@dataclass(frozen=True)
class Cost:
    """A run of many steps on slices that fail.

    Attributes:
      seconds: on the clock; goodput: the part of it in which steps are computed that are kept.
      mtbf: seconds between failures of the run; save_every: seconds of work between checkpoints.
      failures: expected in the whole run.
      energy: joules of the chips alone, at their mean power; None where it is not published.
    """

    seconds: float
    goodput: float
    mtbf: float
    save_every: float
    failures: float
    chip_hours: float
    energy: float | None

    @property
    def days(self) -> float:
        return self.seconds / DAY


def failures_a_day(slice: Slice, slices: int = 1, rates: FailureRates | None = None) -> float:
    """Failures a day of what a run stands on: its hosts, cables, and the switches of its pod."""
    rates = FailureRates() if rates is None else rates
    pod, count = slice.pod, slice.num_hosts * slices * rates.host
    if pod.block is not None and slice.is_whole_blocks:
        cables = pod.block.electrical_links + pod.block.optical_links
        count += slice.num_blocks * slices * cables * rates.cable
        count += (pod.num_switches or 0) * rates.switch
    else:
        count += slice.num_links * slices * rates.cable
    return count


def cost_of(
    steps: float,
    step_seconds: float,
    slice: Slice,
    *,
    slices: int = 1,
    rates: FailureRates | None = None,
    costs: Costs = ASSUMED_COSTS,
) -> Cost:
    """The cost of so many steps, with a checkpoint as often as is best.

    A failure loses the work since the last checkpoint, and takes a rewiring and a restore
    (`topology.fleet`: published rates, assumed costs).
    """
    number("steps", steps, above=0)
    number("step_seconds", step_seconds, above=0, unit="seconds")
    slices = whole("slices", slices, least=1)
    mtbf = DAY / failures_a_day(slice, slices, rates)
    work = best_interval(costs.save, mtbf)
    kept = efficiency(work, costs.save, costs.restore + costs.reconfigure, mtbf)
    seconds = steps * step_seconds / kept if kept > 0 else math.inf
    chips = slice.num_chips * slices
    power = slice.pod.chip.power
    return Cost(
        seconds=seconds,
        goodput=kept,
        mtbf=mtbf,
        save_every=work,
        failures=seconds / mtbf,
        chip_hours=chips * seconds / HOUR,
        energy=None if power is None else chips * seconds * power[1],
    )
