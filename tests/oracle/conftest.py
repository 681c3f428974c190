"""These tests need torch, which `make test-oracle` brings; elsewhere they are not collected."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]
