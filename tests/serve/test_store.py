"""Which models are open: on demand, within the memory budget, and fairly."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.serve.models import Model, Source
from diffpress.serve.store import ModelStore
from diffpress.serve.web.app import create_app
from tests.serve.conftest import make_service, post

SIZE = 1878  # bytes of the tiny bundle's graph


def test_names_are_distinct_and_models_fit_the_budget(tiny: Path) -> None:
    first, second = (Model(Source(tiny), EngineOptions(), 8) for _ in range(2))
    with pytest.raises(InvalidInputError, match="name a bundle with NAME=PATH"):
        ModelStore([first, second])
    with pytest.raises(InvalidInputError, match=r"more than the memory budget of 0\.0 MiB"):
        ModelStore([first], SIZE - 1)
    assert first.graph_bytes == SIZE


@pytest.mark.parametrize(("budget", "most"), [(None, 3), (3 * SIZE, 3), (3 * SIZE - 1, 2), (SIZE, 1)])
def test_the_least_recently_used_is_closed_for_another(tiny: Path, budget: int | None, most: int) -> None:
    async def run() -> None:
        service = make_service(*(Source(tiny, name) for name in "abc"), budget_bytes=budget)
        app, opened = create_app(service), service.store.models
        async with service.running():
            for index, name in enumerate("abcabc"):
                messages = await post(app, "/v1/sample", {"model": name, "seed": 1, "labels": 0})
                assert messages[0]["status"] == 200
                found = {other for other, model in opened.items() if model.pipeline is not None}
                recent = dict.fromkeys(reversed("abcabc"[: index + 1]))
                assert found == set(list(recent)[:most])
        assert all(model.pipeline is None for model in opened.values())

    asyncio.run(run())


def test_models_that_do_not_fit_together_take_turns_under_load(tiny: Path) -> None:
    async def run() -> None:
        service = make_service(*(Source(tiny, name) for name in "ab"), budget_bytes=SIZE)
        app, store = create_app(service), service.store
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, sum(model.pipeline is not None for model in store.models.values()))
                await asyncio.sleep(0)

        async with service.running():
            watching = asyncio.create_task(watch())
            answers = await asyncio.gather(
                *(post(app, "/v1/sample", {"model": "ab"[k % 2], "seed": k, "n": 2, "steps": 2}) for k in range(30))
            )
            watching.cancel()
        assert {messages[0]["status"] for messages in answers} == {200} and most == 1

    asyncio.run(run())


def test_an_open_model_goes_on_while_another_one_is_opened(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        service = make_service(*(Source(tiny, name) for name in "ab"))
        app, (fast, slow) = create_app(service), service.store.models.values()
        async with service.running():
            await service.preload()
            opening, go_on = asyncio.Event(), asyncio.Event()
            loop, open_slow = asyncio.get_running_loop(), slow.open

            def held() -> object:
                loop.call_soon_threadsafe(opening.set)
                asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(40)
                return open_slow()

            monkeypatch.setattr(slow, "open", held)
            waiting = asyncio.create_task(post(app, "/v1/sample", {"model": slow.name}))
            await opening.wait()
            assert (await post(app, "/v1/sample", {"model": fast.name}))[0]["status"] == 200
            go_on.set()
            assert (await waiting)[0]["status"] == 200

    asyncio.run(run())


def test_a_model_that_cannot_be_opened_is_answered_and_tried_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        service = make_service(tiny)
        app, model = create_app(service), service.store.named(None)
        async with service.running():
            with monkeypatch.context() as patch:
                patch.setattr(model, "engine", "nothing")
                answers = await asyncio.gather(*(post(app, "/v1/sample", {}) for _ in range(3)))
                assert [messages[0]["status"] for messages in answers] == [500] * 3 and not model.users
            assert (await post(app, "/v1/sample", {}))[0]["status"] == 200

    asyncio.run(run())
