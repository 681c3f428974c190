"""`torsion slice`: what the interconnect of a slice gives."""

from typing import Any

from pjit_train.errors import UserError
from topology import TPU_V4, Part, Slice, throughput


def report(shape: str, failed_ocs: str | None = None) -> dict[str, Any]:
    """The figures of a slice, as `torsion slice --json` prints them.

    Args:
      shape: such as "4x4x8" or "4x4x8_twisted".
      failed_ocs: "x,0,0": dimension and in-face position of an optical switch that fails.

    Returns:
      Links are counted in one direction. `all_to_all.max_link_load` is the load of the most loaded
      link when each chip sends one unit to every other, the least over all routings, and
      `lower_bound` the proof of it; `ratio_to_regular` the regular slice's load over this one's.
      With a failed switch `all_to_all_kept` is the fraction of the throughput that the best routing
      keeps.

    Raises:
      UserError: there is no such slice or switch, or the switch is none of this slice's.
    """
    try:
        slice = Slice.parse(shape)
        flow = throughput.all_to_all(slice)
        regular = throughput.all_to_all(Slice(shape=slice.shape)) if slice.is_twisted else flow
        bandwidth = TPU_V4.chip.link_bandwidth
        found = {
            "shape": list(slice.shape),
            "twisted": slice.is_twisted,
            "torus": bool(slice.is_torus),
            "chips": slice.num_chips,
            "blocks": slice.num_blocks,
            "diameter": int(slice.diameter),
            "mean_distance": float(slice.mean_distance),
            "bisection_links": int(slice.bisection_links),
            "all_to_all": {
                "max_link_load": float(flow.max_link_load),
                "lower_bound": float(flow.lower_bound),
                "ratio_to_regular": float(regular.max_link_load / flow.max_link_load),
                "bytes_per_second_per_chip": throughput.bytes_per_second_per_chip(
                    slice, flow.max_link_load, bandwidth
                ),
            },
        }
        if failed_ocs is not None:
            switch = Part.parse(f"ocs:{failed_ocs}", TPU_V4)
            links = throughput.switch_links(slice, *switch.where)
            found["failed_ocs"] = failed_ocs
            found["all_to_all_kept"] = float(throughput.all_to_all_kept(slice, links))
    except ValueError as error:
        raise UserError(f"slice: {error}") from error
    return found


def describe(found: dict[str, Any]) -> str:
    """A report as a page for people."""
    a2a = found["all_to_all"]
    kind = "twisted torus" if found["twisted"] else "torus" if found["torus"] else "mesh"
    blocks = f"{found['blocks']} block" + ("s" if found["blocks"] > 1 else "")
    lines = [
        f"{'x'.join(map(str, found['shape']))}: a {kind} of {found['chips']} chips in {blocks}",
        f"  diameter              {found['diameter']} hops",
        f"  mean distance         {found['mean_distance']:.3f} hops",
        f"  bisection             {found['bisection_links']} links, one way",
        f"  all-to-all            {a2a['bytes_per_second_per_chip'] / 1e9:.1f} GB/s a chip, "
        f"most loaded link {a2a['max_link_load']:.2f} units (proved: no routing has less than "
        f"{a2a['lower_bound']:.2f})",
    ]
    if found["twisted"]:
        lines.append(f"  against untwisted     {a2a['ratio_to_regular']:.3f} times the all-to-all")
    if "all_to_all_kept" in found:
        kept = f"{found['all_to_all_kept']:.2%} of the all-to-all kept"
        lines.append(f"  without OCS {found['failed_ocs']:<9} {kept}")
    return "\n".join(lines)
