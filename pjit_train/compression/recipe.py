"""Recipe of one-shot compression of the kernels of a model, be it a run's or a folder's."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from pjit_train.compression.kernels import METHODS, QUANTIZERS, parse_format
from pjit_train.errors import UserError
from sparsity.post_training.gptq import Scales
from sparsity.ranges import Count, Fraction, Whole, check_choice, check_fields

ORDERS = ("sparsify_then_quantize", "quantize_then_sparsify")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compression:
    """Compression of a run's kernels: smooth, then prune and quantize in the given `order`.

    Attributes:
      patterns: of the kernels that are pruned, by name; see `kernel_patterns`.
      method: that prunes them, a name of `METHODS`.
      transposable: N:M along inputs and outputs.
      formats: of the kernels that are quantized, by name; see `kernel_formats`.
      quantizer: a name of `QUANTIZERS`.
      order: which comes first.
      smooth: strength of SmoothQuant, or None.
      finetune: steps that the pruned model is trained before it is quantized, its zeros kept.
      reconstruct: of a folder, passes over the calibration text in which the kept weights of each
        pruned block are fitted to the dense block's outputs, before it is quantized; see
        `reconstruct`.
      activations: format of the inputs of the quantized kernels, or None; for the record: the run
        that is written has it in its configuration.
      sequences: of calibration text, from the start of the run's training.

    Raises:
      UserError: parts that do not go together.
    """

    patterns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    method: str = "sparsegpt"
    transposable: bool = False
    formats: Mapping[str, str] = dataclasses.field(default_factory=dict)
    quantizer: str = "gptq"
    order: Literal["sparsify_then_quantize", "quantize_then_sparsify"] = "sparsify_then_quantize"
    smooth: Fraction | None = None
    finetune: Whole = 0
    reconstruct: Whole = 0
    activations: str | None = None
    sequences: Count = 128

    def __post_init__(self):
        check_fields(self, UserError)
        for name, known in (("method", METHODS), ("quantizer", QUANTIZERS), ("order", ORDERS)):
            check_choice(f"compress: {name}", getattr(self, name), known, UserError)
        if not self.patterns and not self.formats:
            raise UserError(
                "compress: nothing is pruned or quantized; give a pattern such as 2:4, a format "
                "such as int8, or both"
            )
        reverse = self.patterns and self.formats and self.order == "quantize_then_sparsify"
        if reverse and self.method == "sparsegpt":
            raise UserError(
                "compress: sparsegpt moves weights, which leaves the format that they were given "
                "before; use magnitude or wanda, or order sparsify_then_quantize"
            )
        if self.finetune and (not self.patterns or reverse):
            raise UserError(
                "compress: fine-tuning trains what pruning left, before it is quantized; use a "
                "pattern and order sparsify_then_quantize, or finetune=0"
            )

        if self.reconstruct and (not self.patterns or reverse):
            raise UserError(
                "compress: reconstruction fits what pruning left, before it is quantized; use a "
                "pattern and order sparsify_then_quantize, or reconstruct=0"
            )

    @property
    def passes(self) -> list[str]:
        """The passes over the model, "sparsify" and "quantize", in their order."""
        found = ["sparsify"] * bool(self.patterns) + ["quantize"] * bool(self.formats)
        return found if self.order == "sparsify_then_quantize" else found[::-1]

    def apply(
        self, kind: str, name: str, kernel_IO: Any, products_II: Any
    ) -> tuple[Any, Scales | None]:
        """Changes one layer of a kernel by one of `passes`; gives its scales if it has a format.

        Args:
          products_II: X^T X of the kernel's inputs; None where neither way of `calibrated` is used.

        Raises:
          UserError: the kernel or the products are not such as the method can take.
        """
        try:
            if kind == "sparsify":
                sparsify = functools.partial(METHODS[self.method], transposable=self.transposable)
                return sparsify(kernel_IO, products_II, self.patterns[name]), None
            format = parse_format(self.formats[name])
            return QUANTIZERS[self.quantizer](kernel_IO, products_II, format)
        except ValueError as error:
            raise UserError(f"compress: {name}: {error}") from error

    @property
    def calibrated(self) -> list[str]:
        """The ways, of those that are used, that read calibration text."""
        found = [self.method] if self.patterns and self.method != "magnitude" else []
        found += [self.quantizer] if self.formats and self.quantizer != "rtn" else []
        found += ["reconstruct"] if self.reconstruct else []
        return found + (["smooth"] if self.smooth is not None else [])
