"""`quantization_config` of config.json: which layers are stored in compressed-tensors formats."""

import re
from collections.abc import Mapping
from typing import Any

from pjit_train.errors import UserError

# The formats that `compressed_tensors_codes.decode` reads.
KNOWN = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("mxfp8-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "nvfp4-pack-quantized"),
)


def check_quantization(quantization: Any) -> None:
    """Raises a UserError where a `quantization_config` is of no format that is read here."""
    what = "quantization_config"
    if not isinstance(quantization, Mapping):
        raise UserError(f"{what}={quantization!r} must be an object")
    if (method := quantization.get("quant_method")) != "compressed-tensors":
        raise UserError(
            f"{what}: quant_method={method!r} is not supported; only 'compressed-tensors' is"
        )
    if quantization.get("sparsity_config") not in (None, {}):
        kind = quantization["sparsity_config"]
        if not isinstance(kind, Mapping) or kind.get("format") != "dense":
            raise UserError(f"{what}: sparsity_config={kind!r} is not supported; leave it out")
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
        raise UserError(f"{what}: config_groups={groups!r} must be an object of objects")
    for name, group in groups.items():
        found = group.get("format") or quantization.get("format")
        if found not in KNOWN:
            raise UserError(
                f"{what}: format {found!r} of {name} is not supported; {', '.join(KNOWN)} are"
            )
        weights = group.get("weights")
        bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
        if type(bits) is not int or not 2 <= bits <= 8:
            raise UserError(f"{what}: num_bits={bits!r} of {name} must be from 2 to 8")
        if weights.get("actorder") in ("group", True):
            raise UserError(f"{what}: actorder of {name} is not supported; only 'static' is")


def stored_as(
    quantization: Mapping[str, Any], module: str, source: str
) -> tuple[str, Mapping[str, Any]]:
    """The format of a layer, and the arguments of its weights; the configuration was checked.

    A layer that no group names belongs to the group of all linear layers.

    Raises:
      UserError: there is no such group.
    """
    for exact in (True, False):
        for group in quantization["config_groups"].values():
            for target in group.get("targets", ()):
                named = re.match(target[3:], module) if target.startswith("re:") else None
                if (named or target == module) if exact else target == "Linear":
                    return group.get("format") or quantization["format"], group["weights"]
    raise UserError(f"{source}: no group of quantization_config names the layer {module}")
