"""The private parts of Orbax that are used are still what they are used as."""

import logging

import orbax.checkpoint as ocp

from pjit_train import orbax_internals


class Where(ocp.CheckpointHandler):
    """Saves nothing, and notes where it is told to."""

    def save(self, directory, *args, **kwargs):
        self.step = directory.parent.name

    def restore(self, directory, *args, **kwargs):
        raise NotImplementedError


@ocp.args.register_with_handler(Where, for_save=True, for_restore=True)
class Nothing(ocp.args.CheckpointArgs):
    pass


def test_a_checkpoint_in_the_making_is_named_as_half_written(tmp_path):
    where = Where()
    with ocp.CheckpointManager(tmp_path, item_names=("a",), item_handlers={"a": where}) as manager:
        manager.save(3, args=ocp.args.Composite(a=Nothing()))
    assert where.step == f"3{orbax_internals.HALF_WRITTEN}"
    assert (tmp_path / "3").is_dir()


def test_orbax_logs_to_the_logger_that_is_filtered(tmp_path, monkeypatch, caplog):
    """Else its tracebacks would stand beside the one line of a mistake."""
    seen, logger = [], logging.getLogger("absl")
    monkeypatch.setattr(logger, "filters", [lambda record: seen.append(record.pathname)])
    caplog.set_level(logging.DEBUG, logger="absl")
    ocp.CheckpointManager(tmp_path).close()
    assert any("orbax" in path for path in seen)
