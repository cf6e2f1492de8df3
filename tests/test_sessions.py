import gc
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
import httpx
import pytest
import torch
from gradio_client import Client
from torch import Tensor

from alignment.server import GuardedBlocks
from alignment.server.gradio_internals import LightSessions
from alignment.server.sessions import Immutable, estimate_bytes, session_state
from tests.http_client import LOCAL


@dataclass(frozen=True)
class Basket(Immutable):
    """Something heavy, with what a visitor put in."""

    weight: Tensor
    things: tuple[str, ...] = ()


FIRST = Basket(torch.zeros(1000))


def put(thing: str, basket: Basket) -> tuple[str, Basket]:
    basket = replace(basket, things=(*basket.things, thing))
    return " ".join(basket.things), basket


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Iterator[GuardedBlocks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        patch.setenv("no_proxy", "127.0.0.1,localhost")
        with GuardedBlocks(analytics_enabled=False) as page:
            thing, said, basket = gr.Textbox(), gr.Textbox(), session_state(FIRST)
            thing.submit(put, [thing, basket], [said, basket], api_name="put")
        page.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
        LightSessions(page, 10**9, 3600)
        yield page
        page.close()


@pytest.fixture
def page(launched) -> GuardedBlocks:
    """The page without any session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launched.state_holder, "max_idle_s", -1)
        launched.state_holder.delete_all_expired_state()
    assert not launched.state_holder.session_data
    return launched


def call(page: GuardedBlocks, thing: str, **more: str) -> str:
    with httpx.Client(base_url=page.local_url, **LOCAL, timeout=60) as http:
        id = http.post("gradio_api/call/put", json={"data": [thing], **more}).json()["event_id"]
        return http.get(f"gradio_api/call/put/{id}").text


def visitor(page: GuardedBlocks) -> Client:
    return Client(page.local_url, verbose=False, analytics_enabled=False)


def test_each_visitor_has_what_is_theirs(page):
    one, other = visitor(page), visitor(page)
    assert one.predict("apple", api_name="/put") == "apple"
    assert other.predict("pear", api_name="/put") == "pear"
    assert one.predict("plum", api_name="/put") == "apple plum"
    for client in (one, other):
        client.close()
    assert FIRST.things == ()


def test_what_is_kept_is_not_copied(page):
    assert deepcopy(FIRST) is FIRST
    assert call(page, "apple", session_hash="anna").startswith("event: complete")
    (session,) = page.state_holder.session_data.values()
    (basket,) = session.state_data.values()
    assert basket.things == ("apple",)
    assert basket.weight.data_ptr() == FIRST.weight.data_ptr()
    assert not [tensor for tensor in tensors() if tensor.shape == (1000,) and tensor is not FIRST.weight]


def tensors() -> list[Tensor]:
    return [found for found in gc.get_objects() if type(found) is Tensor]


def test_the_initial_value_is_not_told_to_the_browser(page):
    config: dict[str, Any] = page.get_config_file()
    (state,) = (part["props"] for part in config["components"] if part["type"] == "state")
    assert "value" not in state


def test_sessions_together_weigh_no_more_than_they_may(page, monkeypatch):
    sessions = page.state_holder
    monkeypatch.setattr(sessions, "max_bytes", 100)
    for name in ("anna", "bob", "carl"):
        call(page, "x" * 20, session_hash=name)
        call(page, "y", session_hash=name)  # it is weighed when it is used
    assert list(sessions.session_data) == ["carl"]
    assert list(sessions.time_last_used) == ["carl"]
    assert 'data: ["x' in call(page, "z", session_hash="carl")


def test_sessions_that_hold_nothing_make_way_for_those_that_do(page, monkeypatch):
    sessions = page.state_holder
    monkeypatch.setattr(sessions, "capacity", 3)
    for name, thing in (("anna", "apple"), ("bob", "bread")):
        call(page, thing, session_hash=name)
        call(page, thing, session_hash=name)
    for number in range(10):
        call(page, "", session_hash=f"nobody {number}")
    assert {"anna", "bob"} < set(sessions.session_data)
    assert len(sessions.session_data) == 3


@dataclass(frozen=True)
class Nothing:
    lazily: Any = None


@pytest.mark.parametrize(
    ("value", "bytes"),
    [
        ("abc", 3),
        (b"ab", 2),
        ((b"a", ["bc"]), 3),
        ({"x": b"abc"}, 3),
        (torch.zeros(3), 12),
        (object(), 0),
        (Nothing(), 0),
    ],
)
def test_what_a_visitor_brought_is_weighed(value, bytes):
    assert estimate_bytes(value) == bytes
    assert estimate_bytes(Nothing(value)) == bytes
