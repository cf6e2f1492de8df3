"""Contract of `alignment.server.gradio_internals` with Gradio, Starlette and uvicorn: each test fails when an upgrade
moves a private part that the module of this name relies on. `make upgrade-check` runs them with the newest releases."""

import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gradio as gr
import httpx
import pytest
import uvicorn
from gradio import component_meta, processing_utils
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

import app
from alignment.bundled import ROOT
from alignment.server import GuardedBlocks, gradio_internals
from alignment.server.gradio_internals import (
    SUPPORTED_GRADIO,
    HeaderTimeoutProtocol,
    LightSessions,
    QueueJanitor,
    check_gradio,
    configure_uvicorn,
    event_data,
    harden_mcp,
    queue_status,
    streaming_session,
    temp_folder,
)
from tests.http_client import LOCAL, run_coroutine, until


class Event(NamedTuple):
    """What Gradio passes to `process_api`."""

    endpoint: str
    inputs: list[Any]
    session: str
    scope: dict[str, Any]


class Recorder(GuardedBlocks):
    """A page that remembers its events."""

    seen: list[Event]

    async def process_api(self, block_fn: Any, inputs: list[Any], *args: Any, **options: Any) -> dict[str, Any]:
        scope = options["request"].request.scope
        self.seen.append(Event(block_fn.api_name, inputs, options["session_hash"], scope))
        return await super().process_api(block_fn, inputs, *args, **options)


@pytest.fixture(scope="module")
def gate() -> threading.Event:
    return threading.Event()


@pytest.fixture(scope="module")
def page(gate, tmp_path_factory) -> Iterator[Recorder]:
    """A launched page with an endpoint, one that waits, and tools for agents."""

    def echo(value: str | dict[str, Any]) -> str:
        return str(value)

    def keep(value: Any, state: list) -> tuple[str, list]:
        return str(value), [*(state or []), str(value)]

    def wait(value: str) -> dict[str, str]:
        assert gate.wait(60)
        return {"said": value}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        patch.setenv("no_proxy", "127.0.0.1,localhost")
        for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT"):
            patch.delenv(name, raising=False)
        with Recorder(analytics_enabled=False) as page:
            page.seen = []
            given, kept = gr.JSON(), gr.State()
            given.change(keep, [given, kept], [gr.Textbox(), kept], api_name="keep", api_visibility="private")
            gr.api(echo, api_name="echo")
            gr.api(wait, api_name="wait")
        configure_uvicorn(0)
        page.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True, mcp_server=True)
        harden_mcp(page)
        LightSessions(page, 10**9, 3600)
        yield page
        gate.set()
        page.close()


def call(page: gr.Blocks, name: str, *data: Any, **more: Any) -> str:
    """Put an event into the queue; its id."""
    url = f"{page.local_url}gradio_api/call/{name}"
    return httpx.post(url, json={"data": data, **more}, **LOCAL).json()["event_id"]


def fetch(page: gr.Blocks, name: str, id: str) -> str:
    return httpx.get(f"{page.local_url}gradio_api/call/{name}/{id}", **LOCAL, timeout=60).text


# ---------------------------------------------------------------- versions


def test_gradio_writes_no_type_stubs_when_it_is_imported():
    assert component_meta.create_or_modify_pyi.__module__ == gradio_internals.__name__
    assert "create_or_modify_pyi" in component_meta.ComponentMeta.__new__.__code__.co_names


def test_an_unsupported_gradio_is_named_with_the_version_to_install():
    first, last = SUPPORTED_GRADIO
    check_gradio(first + ".0")
    check_gradio(first + ".9rc1")
    for wrong in ("5.50.0", "6.24.0", f"{last}.0", "7.0"):
        with pytest.raises(ValueError, match=f"{re.escape(wrong)}.*gradio>={re.escape(first)},<{re.escape(last)}"):
            check_gradio(wrong)


def test_the_requirements_name_the_supported_versions():
    bounds = f">={SUPPORTED_GRADIO[0]},<{SUPPORTED_GRADIO[1]}"
    assert f"gradio{bounds}\n" in (ROOT / "requirements.txt").read_text("utf-8")
    assert f'"gradio[mcp]{bounds}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_no_other_module_touches_a_private_part():
    """Attributes of other objects that begin with "_", and public names of Gradio's inside."""
    ours = r"(?<!self)(?<!cls)(?<!os)(?<!event)"
    private = re.compile(rf"{ours}\._[a-z]\w*|state_holder|mcp_server_obj|get_blocks|HTTP_PROTOCOLS|gradio\.[a-z]")
    files = [*(ROOT / "alignment" / "ui").rglob("*.py"), *(ROOT / "alignment" / "server").glob("*.py"), ROOT / "app.py"]
    found = {file.name for file in files if private.search(file.read_text("utf-8"))}
    assert found == {"gradio_internals.py"}


# ---------------------------------------------------------------- events and queue


def test_events_pass_through_the_hook_before_their_files_are_fetched(page, monkeypatch):
    fetched: list[str] = []
    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", lambda url, *_: fetched.append(url))
    sent = {"path": "http://127.0.0.1:1/a.png", "meta": {"_type": "gradio.FileData"}}
    told = fetch(page, "echo", call(page, "echo", sent, session_hash="anna"))
    event = page.seen[-1]
    assert "Addresses on the network are not opened" in told
    assert fetched == []
    assert (event.endpoint, event.session, event.inputs[0]["path"]) == ("echo", "anna", sent["path"])
    assert event.scope["path"].endswith("/call/echo")


def test_the_queue_tells_what_waits_and_forgets_only_what_is_over(page, gate):
    gate.clear()
    janitor = QueueJanitor(page, max_age_s=3600, max_idle=1)

    def known() -> list[str]:
        return [id for id in ids if streaming_session(page, id)]

    ids = [call(page, "wait", "x") for _ in range(3)]  # one runs, two wait
    until(lambda: (queue_status(page).waiting, queue_status(page).active) == (2, 1))
    janitor.collect()
    assert known() == ids  # unfinished
    gate.set()
    until(lambda: not (queue_status(page).waiting or queue_status(page).active))
    assert queue_status(page).undelivered

    def collected() -> list[str]:
        janitor.collect()
        return known()

    until(lambda: len(collected()) == 1)
    (left,) = known()  # the newest may wait for its client
    assert "event: complete" in fetch(page, "wait", left)
    until(lambda: not collected())
    assert not queue_status(page).undelivered
    assert not queue_status(page).broken


def test_a_session_whose_client_has_left_is_forgotten(page, gate):
    gate.clear()
    janitor = QueueJanitor(page, max_age_s=3600, max_idle=100)
    first = call(page, "wait", "x")
    until(lambda: queue_status(page).active == 1)
    call(page, "wait", "y", session_hash="leaver")
    url, params = f"{page.local_url}gradio_api/queue/data", {"session_hash": "leaver"}
    with httpx.stream("GET", url, params=params, **LOCAL, timeout=60) as events:
        assert "estimation" in next(events.iter_lines())

    def forgotten() -> bool:
        janitor.collect()
        return not streaming_session(page, "leaver")

    until(forgotten)
    gate.set()
    assert "event: complete" in fetch(page, "wait", first)


def test_the_queue_looks_less_often_for_events_than_gradios_own(page):
    usual, ours = gr.Blocks()._queue, page._queue
    QueueJanitor(page, 3600, 100)
    assert ours.sleep_when_free > usual.sleep_when_free > 0
    assert ours.progress_update_sleep_when_free > usual.progress_update_sleep_when_free > 0


def test_what_a_script_sends_reaches_its_listener():
    assert event_data(gr.EventData(None, {"id": "a"})) == {"id": "a"}
    assert event_data(gr.EventData(None, None)) == event_data(gr.EventData(None, [1])) == {}


def test_no_statistics_are_kept():
    """Gradio's own of the last 10,000 events take time after each; `app` switches them off in the environment."""
    queue = gr.Blocks(analytics_enabled=False)._queue
    queue.events_recorded = 10**9
    assert app.ROOT
    assert queue.ANALYTICS_MAX_EVENTS == 1
    assert queue.compute_analytics_summary([{"function": "f", "status": "success"}]) == {"functions": {}}


# ---------------------------------------------------------------- sessions


def test_sessions_describe_no_components_and_are_bounded(page):
    sessions = page.state_holder
    assert isinstance(sessions, LightSessions)
    assert page.app.state_holder is page.state_holder is sessions
    assert "b" * 100 in fetch(page, "keep", call(page, "keep", "b" * 100, session_hash="bob"))
    assert "bob" in sessions
    assert len(list(sessions["bob"].components)) < len(page.blocks)
    until(lambda: not queue_status(page).active)
    sessions.delete_all_expired_state()
    assert "bob" in sessions.time_last_used
    expire_all(sessions)
    assert "bob" not in sessions
    assert "bob" not in sessions.time_last_used


def expire_all(sessions: LightSessions) -> None:
    before, sessions.max_idle_s = sessions.max_idle_s, 0
    sessions.delete_all_expired_state()
    sessions.max_idle_s = before


def test_a_call_without_a_session_opens_none(page):
    expire_all(page.state_holder)
    assert "event: complete" in fetch(page, "keep", call(page, "keep", "x"))
    assert not page.state_holder.session_data


# ---------------------------------------------------------------- tools


def use_tool(page: gr.Blocks, name: str, value: Any, **headers: str) -> list[Any]:
    """Let an agent call a tool; the texts of its answer."""

    async def talk() -> list[Any]:
        http = httpx.AsyncClient(headers=headers, **LOCAL)
        stream = streamable_http_client(f"{page.local_url}gradio_api/mcp/", http_client=http)
        async with http, stream as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            (tool,) = [tool.name for tool in (await session.list_tools()).tools if tool.name.endswith(name)]
            return [part.text for part in (await session.call_tool(tool, {"value": value})).content]

    return run_coroutine(talk())


def test_tools_answer_in_json_and_upload_no_file(page, gate, tmp_path):
    gate.set()
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    assert [json.loads(text) for text in use_tool(page, "wait", "狗")] == [{"said": "狗"}]
    meta = {"_type": "gradio.FileData"}
    file = {"path": str(secret), "meta": meta}
    for sent in (file, {"path": file, "meta": meta}, {"path": str(secret), "meta": "none"}):
        use_tool(page, "echo", sent)
        given = [event.inputs[0] for event in page.seen if event.endpoint == "echo"].pop()
        assert given == str(secret)  # and no file that has been read
        page.seen.clear()
    assert not list(Path(page.GRADIO_CACHE).rglob("secret*"))


def test_headers_of_an_agents_request_reach_the_tools_request(page, gate):
    """The middleware puts a token into them, by which it knows the request that the tool makes."""
    gate.set()
    use_tool(page, "wait", "x", **{"x-token": "abc"})
    event = [event for event in page.seen if event.endpoint == "wait"][-1]
    assert (b"x-token", b"abc") in event.scope["headers"]


# ---------------------------------------------------------------- connections and folders


def test_uvicorn_takes_the_protocol_and_closes_idle_connections():
    configure_uvicorn(3)
    config = uvicorn.Config(lambda: None)
    config.load()
    assert config.http_protocol_class is HeaderTimeoutProtocol


def test_uvicorn_leaves_its_log_to_the_handlers_of_the_process():
    names = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")
    for name in names:
        logging.getLogger(name).handlers.clear()  # of servers that ran before `configure_uvicorn`
        logging.getLogger(name).propagate = True
    configure_uvicorn(0)
    uvicorn.Config(lambda: None)
    assert not any(logging.getLogger(name).handlers for name in names)
    assert all(logging.getLogger(name).propagate for name in names)


def test_gradio_makes_its_own_folders_where_it_is_told(tmp_path):
    with temp_folder(str(tmp_path)):
        assert os.environ["GRADIO_TEMP_DIR"] == tempfile.gettempdir() == str(tmp_path)
        with gr.Blocks(analytics_enabled=False) as page:
            gr.Textbox()
        gr.routes.App.create_app(page)
        assert list(tmp_path.iterdir()) != []
    assert os.environ.get("GRADIO_TEMP_DIR") != str(tmp_path)
    assert tempfile.gettempdir() != str(tmp_path)


def test_the_page_of_a_scope_is_found(page):
    assert gradio_internals.blocks_of({"app": page.app}) is page
    with pytest.raises((AttributeError, KeyError)):
        gradio_internals.blocks_of({"app": SimpleNamespace()})
