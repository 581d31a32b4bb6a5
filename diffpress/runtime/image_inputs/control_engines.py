"""Engines that only control images need: the controlled denoiser and the control networks, opened for the first one."""

from __future__ import annotations

from diffpress.runtime.bundle import Bundle
from diffpress.runtime.engines import Engine, open_controlled, open_engine
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.image_inputs.control import CONTROL_IMAGE, ControlRequest
from diffpress.runtime.image_inputs.control_networks import Control, make_control


class ControlEngines:
    """The engines of a bundle's control networks, which stay open for the next images.

    Args:
        bundle: The bundle.
        engine: Name of the engine that its denoiser runs in.
        options: Options of that engine.
    """

    def __init__(self, bundle: Bundle, engine: str, options: EngineOptions) -> None:
        self._bundle, self._engine, self._options = bundle, engine, options
        self._controlled: Engine | None = None
        self._networks: dict[str, Engine] = {}

    def control(self, request: ControlRequest, count: int) -> Control:
        """Return the control of `count` samples by the images of a request.

        Raises:
            InvalidInputError: There are neither one nor `count` images for a network.
            EngineUnavailableError: The engine cannot run a graph on this machine.
        """
        pairs = zip(self._bundle.control_networks, request.images, strict=False)
        names = [name for name, image in pairs if image is not None]
        if self._controlled is None:
            self._controlled = open_controlled(self._bundle, self._engine, self._options)
        for name in names:
            if name not in self._networks:
                self._networks[name] = open_engine(self._bundle, self._engine, graph=name, options=self._options)
        graphs, networks = self._bundle.manifest["graphs"], [self._networks[name] for name in names]
        channels = [graphs[name]["inputs"][CONTROL_IMAGE]["shape"][1] for name in names]
        return make_control(request, self._controlled, networks, channels, count)

    def close(self) -> None:
        """Release the engines."""
        for engine in (self._controlled, *self._networks.values()):
            if engine is not None:
                engine.close()
