"""A pod of hosts: Ray runs the trainer on all of them, and starts it again when some are lost.

The command starts a `driver` and a watchdog keeps it alive (`keeper`). The driver holds Ray
(`cluster`) and runs attempt after attempt (`supervisor`): an `agent` on each host holds a
`trainer`, and the `manager` holds the fabric.
"""
