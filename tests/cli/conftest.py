"""Fixtures of other test folders that the command line tests also use."""

from tests.export.conftest import _one_thread, unet, unet_graph, wide, wide_graph  # noqa: F401
from tests.runtime.conftest import temporary_cache, tiny  # noqa: F401
