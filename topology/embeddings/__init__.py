"""Embedding tables on a slice: unique ids, bytes and times of a step, and the best shardings."""

from topology.embeddings.document import model_of
from topology.embeddings.machine import Machine
from topology.embeddings.plan import DoNotFitError, Plan, fitting_slice, plan_tables
from topology.embeddings.skew import PowerLaw
from topology.embeddings.tables import DLRM_V2, EmbeddingModel, Table, synthetic

__all__ = [
    "DLRM_V2",
    "DoNotFitError",
    "EmbeddingModel",
    "Machine",
    "Plan",
    "PowerLaw",
    "Table",
    "fitting_slice",
    "model_of",
    "plan_tables",
    "synthetic",
]
