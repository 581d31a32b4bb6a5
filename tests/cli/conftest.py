"""Fixtures of other test folders that the command line tests also use."""

import importlib.util

from tests.runtime.conftest import temporary_cache, tiny  # noqa: F401

if importlib.util.find_spec("torch"):  # test_sample.py also runs where torch is not installed
    from tests.export.conftest import _one_thread, unet, unet_graph, wide, wide_graph  # noqa: F401
