import base64
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import gradio as gr
import httpx
import pytest
import torch
from gradio import processing_utils
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from PIL import Image

import app
from alignment.engine import Alignment, AlignmentEngine
from alignment.gallery import Gallery
from alignment.gallery.records import GalleryMetadata
from alignment.model import DualEncoder
from alignment.preprocess import InputError
from alignment.server import GuardedBlocks, Service, Settings
from alignment.ui.api import MAX_CAPTIONS, MAX_PICTURES, MAX_RESULTS, Api, add_api
from alignment.ui.api_schemas import matrix
from alignment.ui.widgets import SEARCHES_AT_ONCE, UPLOADS_AT_ONCE
from tests.http_client import LOCAL, entries, run_coroutine

ENDPOINTS = {"search_images", "search_captions", "similarity_matrix", "embed_images", "embed_captions", "describe"}
HERE = "http://127.0.0.1:7860"  # what the documentation says
PAGES = ("docs/api.md", "docs/zh-CN/api.md")


@pytest.fixture(scope="module")
def engine() -> AlignmentEngine:
    return app.load_engine(app.parse(["--model", str(app.ROOT / "checkpoints/compact")]))


@pytest.fixture(scope="module")
def uploads(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        patch.setenv("no_proxy", "127.0.0.1,localhost")
        for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT"):
            patch.delenv(name, raising=False)
        yield folder


@pytest.fixture(scope="module")
def address(engine, uploads) -> Iterator[str]:
    """Serve the page with its tools, once for all tests."""
    page = app.build_page(engine, "en")
    options = app.launch_options(engine, Service(Settings(rate=0)))
    _, url, _ = page.launch(prevent_thread_lock=True, server_name="127.0.0.1", mcp_server=True, **options)
    yield url.rstrip("/")
    page.close()


@pytest.fixture(scope="module")
def ask(address) -> Iterator[Callable[..., Any]]:
    """Ask an endpoint as a program would: `ask("search_images", caption=...)`. A client takes a second to close."""
    client = Client(address, verbose=False, analytics_enabled=False)
    yield lambda name, **values: client.predict(**values, api_name=f"/{name}")
    client.close()


@pytest.fixture
def photo(engine) -> Callable[[str], Path]:
    return lambda id: next(picture.path for picture in engine.gallery.pictures if picture.id == id)


def files(folder: Path) -> list[Path]:
    return [path for path in entries(folder) if path.is_file()]


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def over_http(address: str, name: str, **values: Any) -> tuple[str, Any]:
    """Call an endpoint by plain HTTP; the kind of its last event, and what it says."""
    with httpx.Client(**LOCAL, timeout=60) as http:
        id = http.post(f"{address}/gradio_api/call/v2/{name}", json=values).json()["event_id"]
        event, data = http.get(f"{address}/gradio_api/call/{name}/{id}").text.strip().split("\n")[-2:]
    return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))


# ---------------------------------------------------------------- what is offered


def test_every_endpoint_is_named_typed_and_described(address):
    info = httpx.get(f"{address}/gradio_api/info", **LOCAL).json()["named_endpoints"]
    assert {name.strip("/") for name in info} == ENDPOINTS
    for endpoint in info.values():
        assert " Returns: " in endpoint["description"]
        assert all(parameter["type"] for parameter in endpoint["parameters"])
        (answer,) = endpoint["returns"]
        assert set(answer["type"]["required"]) == set(answer["type"]["properties"])


def test_programs_wait_in_the_queues_of_the_page(engine):
    queues = {(fn.concurrency_id, fn.concurrency_limit) for fn in app.build_page(engine).fns.values() if fn.queue}
    assert queues == {("search", SEARCHES_AT_ONCE), ("upload", UPLOADS_AT_ONCE)}


def test_the_limits_are_said_where_one_looks_for_them(ask):
    limits = ask("describe")["limits"]
    for name in PAGES:
        said = page(name)
        for limit in limits.values():
            assert re.search(rf"\b{limit}\b|{limit // 100}00 万", said), (name, limit)
    for name in ("search_images", "search_captions"):
        assert f"1 to {MAX_RESULTS}." in (getattr(Api, name).__doc__ or "")
    assert f"1 to {MAX_PICTURES} pictures" in (Api.similarity_matrix.__doc__ or "")
    assert f"1 to {MAX_CAPTIONS} captions" in (Api.similarity_matrix.__doc__ or "")


def test_it_says_which_model_and_gallery_answer(ask, engine):
    answer = ask("describe")
    assert answer["model"] == "compact"  # and not where it lies
    assert answer["fingerprint"] == engine.encoder.fingerprint
    assert (answer["images"], answer["captions"]) == (len(engine.gallery.pictures), len(engine.gallery.captions))
    assert (answer["languages"], answer["calibrated"]) == (["en", "zh"], True)


# ---------------------------------------------------------------- what is answered


@pytest.mark.parametrize(("caption", "id"), [("a tabby cat", "cat"), ("一杯咖啡", "coffee")])
def test_a_caption_finds_pictures(ask, caption, id):
    found = ask("search_images", caption=caption, k=3)
    assert [match["rank"] for match in found["matches"]] == [1, 2, 3]
    best = found["matches"][0]
    assert best["id"] == id
    assert set(best["captions"]) == {"en", "zh"}
    assert best["credit"]
    assert best["thumbnail"] == f"thumbnails/{id}.webp"
    assert (found["fits"], found["verdict"]) == (True, best["verdict"])
    assert {match["verdict"] for match in found["matches"]} <= {"fits", "may_fit", "nothing_close"}
    for match in (*found["matches"], {**best, "probability": found["something_fits"]}):
        assert -1 <= match["similarity"] <= 1
        assert 0 <= match["share"] <= 1
        assert 0 <= match["probability"] <= 1


def test_the_thumbnail_of_a_result_can_be_opened(ask, address):
    best = ask("search_images", caption="a rocket", k=1)["matches"][0]
    answer = httpx.get(f"{address}/{best['thumbnail']}", **LOCAL)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")


def test_nonsense_fits_nothing(ask):
    found = ask("search_images", caption="xqzv wkjh ppfft")
    assert (found["fits"], found["verdict"]) == (False, "no_meaning")
    assert len(found["matches"]) == 12


@pytest.mark.parametrize(("lang", "langs"), [("en", {"en"}), ("zh", {"zh"})])
def test_a_picture_finds_captions_of_a_language(ask, photo, lang, langs):
    found = ask("search_captions", image=handle_file(photo("cat")), k=5, lang=lang)
    assert {match["lang"] for match in found["matches"]} == langs
    assert any(word in match["text"] for match in found["matches"] for word in ("cat", "猫"))


def test_without_a_language_all_captions_compete(ask, engine, photo):
    found = ask("search_captions", image=handle_file(photo("cat")))
    every = engine.search_captions(engine.embed_image(photo("cat")), 10)
    assert [match["id"] for match in found["matches"]] == [match.item.id for match in every.matches]


def test_the_matrix_is_what_the_embeddings_say(ask, photo):
    images = [handle_file(photo(id)) for id in ("cat", "coffee")]
    captions = ["a cup of coffee", "一只猫", "a rocket"]
    table = ask("similarity_matrix", images=images, captions=captions)
    pictures = ask("embed_images", images=images)
    texts = ask("embed_captions", captions=captions)
    assert pictures["fingerprint"] == texts["fingerprint"]
    cosines = torch.tensor(pictures["embeddings"]) @ torch.tensor(texts["embeddings"]).T
    torch.testing.assert_close(torch.tensor(table["similarity"]), cosines, atol=1e-4, rtol=0)
    scale = ask("describe")["logit_scale"]
    softmax = torch.softmax(torch.tensor(table["similarity"]) * scale, dim=1)
    torch.testing.assert_close(torch.tensor(table["softmax_over_captions"]), softmax, atol=1e-4, rtol=0)
    columns = torch.tensor(table["softmax_over_images"]).sum(dim=0)
    torch.testing.assert_close(columns, torch.ones(3), atol=1e-4, rtol=0)
    assert table["best_captions"] == [1, 0]
    assert table["best_images"][:2] == [1, 0]
    assert table["sigmoid"] is None


def test_the_first_of_equals_is_the_best_of_each_picture_and_caption():
    similarity = torch.tensor([[0.1, 0.9, 0.9], [0.8, 0.2, 0.3]])
    table = matrix(Alignment(similarity, similarity * 10), None)
    assert table["best_captions"] == [1, 0]
    assert table["best_images"] == [1, 0, 0]
    torch.testing.assert_close(torch.tensor(table["softmax_over_captions"]).sum(dim=1), torch.ones(2))
    torch.testing.assert_close(torch.tensor(table["softmax_over_images"]).sum(dim=0), torch.ones(3))


def test_a_model_with_a_bias_judges_each_pair_by_itself(checkpoint, pictures, encoded):
    encoder = DualEncoder.load(checkpoint("siglip"), device="cpu")
    none, metadata = (
        torch.empty(0, encoder.embed_dim),
        GalleryMetadata(encoder.fingerprint, "tiny", encoder.logit_scale, None),
    )
    engine = AlignmentEngine(encoder, Gallery((), (), none, none, metadata))
    urls = [f"data:image/png;base64,{base64.b64encode(encoded(image, 'PNG')).decode()}" for image in pictures]
    table = Api(engine).similarity_matrix(urls, ["two cats", "pasta"])
    logits = torch.tensor(table["similarity"]) * encoder.logit_scale + encoder.logit_bias
    torch.testing.assert_close(torch.tensor(table["sigmoid"]), torch.sigmoid(logits), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("k", [0, -1, MAX_RESULTS + 1, 2.5, True, "3", None, float("nan"), float("inf"), [3]])
def test_k_is_a_whole_number_within_its_limits(engine, k):
    with pytest.raises(InputError, match="k has to be a whole number from 1 to 100"):
        Api(engine).search_images("a cat", k)


@pytest.mark.parametrize(
    ("captions", "said"),
    [
        ([], "captions has to be a list of 1 to 64"),
        (["a"] * 65, "captions has to be a list of 1 to 64"),
        ("a cat", "captions has to be a list of 1 to 64"),
        (None, "captions has to be a list of 1 to 64"),
        (["a cat", 5], "Caption 2: A caption has to be text"),
        (["a cat", " "], "Caption 2: The caption is empty"),
        (["x" * 1001], "Caption 1: The caption has 1001 characters"),
    ],
)
def test_captions_are_a_list_of_texts_within_their_limits(engine, captions, said):
    with pytest.raises(InputError, match=said):
        Api(engine).embed_captions(captions)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "images has to be a list of 1 to 64"),
        (["data:,"] * 65, "images has to be a list of 1 to 64"),
        ("data:,", "images has to be a list of 1 to 64"),
        ([5], "A picture is a data URL or an uploaded file"),
        ([{"path": 5}], "A picture is a data URL or an uploaded file"),
        ([{}], "A picture is a data URL or an uploaded file"),
        ([""], "A picture is a data URL or an uploaded file"),
        (["data:image/png,abc"], "A data URL has to look like"),
        (["data:image/png;base64,?"], "A data URL has to look like"),
        (["data:image/png;base64,é"], "A data URL has to look like"),
        (["data:image/png;base64,"], "A data URL has to look like"),
        (["data:image/png;base64," + "A" * 42_000_000], "more than 30 MB"),
        ([f"data:;base64,{base64.b64encode(b'hello').decode()}"], "not a picture"),
        (["http://127.0.0.1:1/a.png"], "Addresses on the network are not opened here"),
        (["http://127.0.0.1:1/gradio_api/file=/etc/hostname"], "did not arrive"),
        (["/etc/hostname"], "did not arrive"),
        (["{outside}"], "did not arrive"),
        (["{uploads}/../outside.png"], "did not arrive"),
        ([{"path": "{outside}", "meta": {"_type": "gradio.FileData"}}], "did not arrive"),
        (["{uploads}"], "did not arrive"),
    ],
)
def test_pictures_are_uploads_or_data_urls_within_their_limits(engine, uploads, images, said):
    outside = uploads.parent / "outside.png"
    Image.new("RGB", (40, 40)).save(outside)
    places = {"outside": str(outside), "uploads": str(uploads)}
    if isinstance(images, list):
        images = json.loads(
            json.dumps(images).replace("{outside}", places["outside"]).replace("{uploads}", places["uploads"])
        )
    with pytest.raises(InputError, match=said):
        Api(engine).embed_images(images)
    assert outside.is_file()


def test_of_several_pictures_the_wrong_one_is_named(engine, photo):
    with pytest.raises(InputError, match="Picture 2: This file is not a picture"):
        Api(engine).embed_images([data_url(photo("cat")), f"data:;base64,{base64.b64encode(b'hello').decode()}"])


@pytest.mark.parametrize("lang", ["fr", 5, ["en"]])
def test_a_language_the_gallery_does_not_have_is_refused(engine, photo, lang):
    with pytest.raises(InputError, match="lang may be en or zh, or empty"):
        Api(engine).search_captions(data_url(photo("cat")), 3, lang)


def test_what_is_wrong_reaches_the_program(ask, address):
    with pytest.raises(AppError, match="The caption is empty"):
        ask("search_images", caption=" ")
    event, data = over_http(address, "search_images", caption="a cat", k=0)
    assert (event, data["error"]) == ("error", "k has to be a whole number from 1 to 100.")


def test_a_failure_of_ours_tells_nothing_but_that_it_is_ours(engine, uploads, caplog):
    broken = AlignmentEngine(engine.encoder, engine.gallery)
    broken.encoder = None  # type: ignore[assignment]
    with GuardedBlocks() as page:
        add_api(broken)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    event, data = over_http(url.rstrip("/"), "search_images", caption="a cat")
    page.close()
    assert (event, data["error"]) == ("error", "That did not work, and it is not your fault; try again.")
    assert "NoneType" in caplog.text


# ---------------------------------------------------------------- nothing is fetched, nothing stays


@pytest.fixture
def elsewhere(monkeypatch, photo) -> Iterator[tuple[str, list[str]]]:
    """A server with a picture that Gradio would fetch (it trusts the host), and the requests it has seen."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(photo("cat").read_bytes())

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(processing_utils, "PUBLIC_HOSTNAME_WHITELIST", ["127.0.0.1"])
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def sent(url: str) -> dict[str, Any]:
    return {"path": url, "url": url, "meta": {"_type": "gradio.FileData"}}


def test_gradio_itself_would_fetch_an_address(engine, uploads, elsewhere):
    url, seen = elsewhere
    with gr.Blocks() as page:
        add_api(engine)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    event, _ = over_http(address.rstrip("/"), "search_captions", image=sent(f"{url}/cat.png"))
    page.close()
    assert (event, seen) == ("complete", ["/cat.png"])


def test_no_address_is_opened_for_a_program(address, elsewhere, ask):
    url, seen = elsewhere
    refused = "Addresses on the network are not opened here"
    for name, values in (
        ("search_captions", {"image": sent(f"{url}/1.png")}),
        ("search_captions", {"image": f"{url}/2.png"}),
        ("embed_images", {"images": [{"x": [sent(f"{url}/3.png")], "path": "y"}]}),
        ("search_images", {"caption": sent(f"{url}/4.png")}),
    ):
        event, data = over_http(address, name, **values)
        assert event == "error"
        assert refused in data["error"]
    with pytest.raises(AppError, match=refused):
        ask("search_captions", image=handle_file(f"{url}/5.png"))
    assert seen == []


def test_the_pages_own_events_open_no_address_either(address, elsewhere):
    url, seen = elsewhere
    config = httpx.get(f"{address}/config", **LOCAL).json()
    hidden = [part for part in config["dependencies"] if part["api_visibility"] == "private" and part["inputs"]]
    assert len(hidden) > 5
    with httpx.Client(**LOCAL, timeout=60) as http:
        for part in hidden:
            inputs = [sent(f"{url}/{part['id']}.png") for _ in part["inputs"]]
            body = {"data": inputs, "fn_index": part["id"], "session_hash": "visitor"}
            http.post(f"{address}/gradio_api/{'queue/join' if part['queue'] else 'run/predict'}", json=body)
        with http.stream("GET", f"{address}/gradio_api/queue/data", params={"session_hash": "visitor"}) as events:
            answers = sum("process_completed" in line for line in events.iter_lines() if line.startswith("data:"))
    assert answers == sum(bool(part["queue"]) for part in hidden)
    assert seen == []


def test_uploads_are_deleted_whatever_the_answer_was(ask, photo, uploads, tmp_path):
    (tmp_path / "notes.jpg").write_text("This is no picture.")
    good, bad = handle_file(photo("cat")), handle_file(tmp_path / "notes.jpg")
    ask("search_captions", image=good)
    ask("embed_images", images=[good, good])
    for name, values in (
        ("search_captions", {"image": bad}),
        ("search_captions", {"image": good, "k": 0}),
        ("similarity_matrix", {"images": [good, bad], "captions": ["a cat"]}),
        ("similarity_matrix", {"images": [good], "captions": []}),
    ):
        with pytest.raises(AppError):
            ask(name, **values)
    assert files(uploads) == []


def test_base64_may_be_in_lines_but_not_bare(engine, photo):
    whole = data_url(photo("cat"))
    head, _, body = whole.partition(",")
    lines = "\r\n".join(body[start : start + 76] for start in range(0, len(body), 76))
    one, two = (Api(engine).embed_images([image])["embeddings"] for image in (whole, f"{head},{lines}\n"))
    assert one == two
    for bare in (body, lines):
        with pytest.raises(InputError, match='"data:image/jpeg;base64," in front'):
            Api(engine).embed_images([bare])


def test_data_urls_leave_no_file(ask, photo, uploads):
    assert ask("search_captions", image=data_url(photo("cat")), k=1)["matches"]
    assert files(uploads) == []


# ---------------------------------------------------------------- tools for agents


def with_tools(address: str, talk: Callable[[ClientSession], Any]) -> Any:
    async def run() -> Any:
        url = f"{address}/gradio_api/mcp/"
        async with streamable_http_client(url) as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            return await talk(session)

    return run_coroutine(run())


def test_every_endpoint_is_a_tool_with_a_text_that_says_what_it_does(address):
    tools = with_tools(address, lambda session: session.list_tools()).tools
    assert {tool.name for tool in tools} == ENDPOINTS
    for tool in tools:
        assert re.match(r"[A-Z].*\. Returns: \w.*\.$", tool.description), tool.description
        assert ",," not in tool.description
        for parameter in tool.inputSchema["properties"].values():
            assert re.match(r"[A-Z0-9].*\.$", parameter["description"])


def test_what_an_agent_asks_is_logged_like_what_others_ask(address, caplog):
    with caplog.at_level(logging.INFO):
        with_tools(address, lambda session: session.call_tool("search_images", {"caption": "a tabby cat", "k": 1}))
    asked = [record.service for record in caplog.records if record.getMessage() == "request"]
    assert {(line["endpoint"], line["outcome"]) for line in asked} >= {("mcp", "ok")}
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_an_agent_searches_and_reads_json(address):
    answer = with_tools(address, lambda session: session.call_tool("search_images", {"caption": "a tabby cat", "k": 1}))
    assert not answer.isError
    (match,) = json.loads(answer.content[0].text)["matches"]
    assert match["id"] == "cat"
    assert "虎斑猫" in answer.content[0].text  # readable, not escaped


def test_an_agent_sends_a_picture_by_the_address_its_upload_got(address, photo, uploads):
    with photo("coffee").open("rb") as file:
        upload = httpx.post(f"{address}/gradio_api/upload", files={"files": file}, **LOCAL).json()[0]
    values = {"image": f"{address}/gradio_api/file={upload}", "k": 3, "lang": "en"}
    answer = with_tools(address, lambda session: session.call_tool("search_captions", values))
    assert "coffee" in answer.content[0].text
    assert files(uploads) == []


@pytest.mark.parametrize("there", [True, False])
def test_an_agent_reads_no_file_of_the_server(address, photo, tmp_path, uploads, there):
    secret = tmp_path / "secret.png"
    if there:
        secret.write_bytes(photo("coffee").read_bytes())
    for tool, values in (
        ("search_captions", {"image": sent(str(secret))}),
        (
            "search_captions",
            {"image": {"path": str(secret), "url": secret.as_uri(), "meta": {"_type": "gradio.FileData"}}},
        ),
        ("embed_images", {"images": [sent(str(secret))]}),
        ("similarity_matrix", {"images": [sent(str(secret))], "captions": ["a cat"]}),
    ):
        answer = with_tools(address, lambda session, tool=tool, values=values: session.call_tool(tool, values))
        assert answer.isError, tool
        assert re.search("did not arrive|has to be text", answer.content[0].text), answer.content[0].text
        assert str(tmp_path) not in answer.content[0].text
    assert files(uploads) == []


def test_an_agent_is_told_what_is_wrong(address, elsewhere):
    url, seen = elsewhere
    for image in (f"{url}/cat.png", sent(f"{url}/cat.png")):
        answer = with_tools(address, lambda session, sent=image: session.call_tool("search_captions", {"image": sent}))
        assert answer.isError
        assert "Addresses on the network are not opened here" in answer.content[0].text
    assert seen == []


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch, capsys, free_port):
    monkeypatch.setitem(sys.modules, "mcp", None)  # as where it is not installed
    assert app.main(["--mcp", "--port", free_port]) == 2
    assert capsys.readouterr().err == 'error: --mcp needs one more package; run: pip install -e ".[mcp]"\n'


# ---------------------------------------------------------------- the documentation


def page(name: str) -> str:
    return (app.ROOT / name).read_text("utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page(name), re.DOTALL)


@pytest.fixture
def shell(address, photo, tmp_path) -> Callable[..., str]:
    """Run a program where `photo.jpg` lies; what it printed."""
    Image.open(photo("cat")).convert("RGB").save(tmp_path / "photo.jpg")
    quiet = {"no_proxy": "127.0.0.1", "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONWARNINGS": "ignore"}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_python_of_the_readmes_and_the_pages_runs(shell, address):
    names = ("README.md", "README.zh-CN.md", *PAGES)
    programs = [block.replace(HERE, address) for name in names for block in blocks(name, "python")]
    assert len(programs) == len(names)
    said = shell(sys.executable, "-c", f"for program in {programs!r}:\n    exec(program, {{}})\n    print('---')")
    *answers, end = said.split("---\n")
    assert end == ""
    for answer in answers:
        assert re.search(r"^1 cat 0\.", answer, re.MULTILINE)
    for answer, words in zip(answers[2:], (("cat",), ("猫", "没有合适的描述")), strict=True):
        assert any(word in answer for word in words)
        assert re.search(r"\[\[0\.\d+, 0\.\d+\]\] \[0\]$", answer.strip())  # the cat, not the coffee


@pytest.mark.parametrize("name", PAGES)
def test_the_curl_of_the_page_runs(shell, address, uploads, name):
    searches = [code for code in blocks(name, "sh") if "curl" in code]
    assert len(searches) == 2
    answers = [shell("bash", "-euc", code.replace(HERE, address)) for code in searches]
    found = [json.loads(answer.partition("event: complete\ndata: ")[2])[0] for answer in answers]
    assert found[0]["matches"][0]["id"] == "cat"
    assert any(word in found[1]["matches"][0]["text"] for word in ("cat", "猫"))
    assert files(uploads) == []


def test_the_agents_configuration_of_the_page_works(shell, address, photo, tmp_path):
    shell("true")  # lays photo.jpg down
    (config,) = blocks(PAGES[0], "json")
    config = config.replace(HERE, address).replace("/path/to/pictures", str(tmp_path))
    servers = json.loads(config.replace(".venv/bin/gradio", str(Path(sys.executable).with_name("gradio"))))
    upload = StdioServerParameters(**servers["mcpServers"]["upload-pictures"], env={"no_proxy": "127.0.0.1"})

    async def run() -> Any:
        async with stdio_client(upload) as (read, write), ClientSession(read, write) as session:
            await session.initialize()
            sent = await session.call_tool("upload_file_to_gradio", {"file": str(tmp_path / "photo.jpg")})
        url = servers["mcpServers"]["image-text-alignment"]["url"]
        async with streamable_http_client(url) as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            return await session.call_tool("search_captions", {"image": sent.content[0].text, "lang": "en"})

    assert "cat" in run_coroutine(run()).content[0].text


def test_the_pages_list_what_is_served_with_its_limits(address):
    info = httpx.get(f"{address}/gradio_api/info", **LOCAL).json()["named_endpoints"]
    for name in PAGES:
        rows = re.findall(r"^\| `(\w+)` \|(?:[^|\n]*\|){2} ([^|\n]+) \|$", page(name), re.MULTILINE)
        assert {endpoint for endpoint, limits in rows if limits.strip()} == {key.strip("/") for key in info}, name
