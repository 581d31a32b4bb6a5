"""Fixtures of other test folders that the command line tests also use."""

from tests.export.conftest import _one_thread, unet, unet_graph, wide, wide_graph  # noqa: F401
from tests.runtime.conftest import no_cache_of_the_user, tiny  # noqa: F401
