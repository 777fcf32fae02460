"""The study's page in a real headless Chromium, and its server by hand: vote, reload, kill, resume, two at once."""

import json
import multiprocessing
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from study_videos import NAMES, make_config, make_folders

from attention_surgery.study import serve
from attention_surgery.study.store import StudyStore

gradio = pytest.importorskip("gradio", reason="the study's page needs Gradio: pip install 'attention-surgery[study]'")

from starlette.testclient import TestClient  # noqa: E402

from attention_surgery.study.app import study_app  # noqa: E402
from attention_surgery.study.server import check_study  # noqa: E402

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SECRETS = ("secret-hybrid", "secret-teacher", "Hybrid15R2", "Wan2.1", "red kite", "slow tram", "two owls", "wet snow")
METHODS = {"ours_name": "Hybrid15R2", "baseline_name": "Wan2.1"}

# The servers are forked from a process that has imported everything once: a start takes no time, SIGKILL is SIGKILL.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["attention_surgery.study.app"])


class Server:
    """`serve` in a process of its own, which can be killed and started again on the same port and files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.start()

    def start(self) -> None:
        config = make_config(self.root, port=self.port, **METHODS)
        self.process = PROCESSES.Process(target=serve, args=(config,))
        self.process.start()
        deadline = time.monotonic() + 60
        while True:
            assert self.process.is_alive() and time.monotonic() < deadline, "the server did not start"
            try:
                return socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except ConnectionRefusedError:
                time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()  # SIGKILL: no handler runs
        self.process.join()

    def votes(self) -> list[Any]:
        return StudyStore(self.root / "v.sqlite").votes()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("page")
    make_folders(root)
    server = Server(root)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need the playwright package")
    if CHROMIUM is None:
        pytest.skip("NO BROWSER: the study's page is NOT tested; apt-get install chromium, or set CHROMIUM to its path")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, server: Server, **options: Any) -> Iterator[Any]:
    """A page of a browser profile of its own; the script must not have raised by the end."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, **options)
    page = context.new_page()
    page.set_default_timeout(20_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    try:
        page.goto(server.url)
        yield page
        assert errors == []
    finally:
        context.close()


def enter(page: Any, rater: str) -> None:
    page.wait_for_selector(".study[data-screen=enter]")
    page.fill("#rater", rater)
    page.keyboard.press("Enter")
    unlocked(page)


def unlocked(page: Any) -> None:
    page.wait_for_selector(".study[data-screen=pair] .answers button:not(:disabled)")


def at_pair(page: Any, number: int) -> None:
    page.wait_for_function(f"document.querySelector('.pair .count')?.textContent === '{number} / {len(NAMES)}'")


# --- by hand ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[TestClient]:
    root = tmp_path_factory.mktemp("client")
    make_folders(root)
    (root / "outside.mp4").write_bytes(b"not to be had")
    config = make_config(root, **METHODS)
    pairs, _ = check_study(config)
    store = StudyStore.create(config.database, config.fixed_settings(), pairs)
    with TestClient(study_app(store, config), base_url="http://127.0.0.1") as client:
        client.root, client.store = root, store
        yield client


def ask(client: TestClient, function: str, data: Any) -> Any:
    text = client.get("/").text
    start = text.index("window.gradio_config = ") + len("window.gradio_config = ")
    components = json.JSONDecoder().raw_decode(text[start:])[0]["components"]
    (component,) = [entry["id"] for entry in components if entry["type"] == "html"]
    body = {"data": data, "component_id": component, "fn_name": function, "session_hash": "by-hand"}
    reply = client.post("/gradio_api/component_server/", json=body)
    assert reply.status_code == 200
    return reply.json()


def test_videos_seek_by_range_and_tell_nothing_of_their_file(client):
    question = ask(client, "enter", "ranger")["question"]
    dates = set()
    for index, token in enumerate((question["left"], question["right"])):
        method, name = client.store.find_video(token)
        path = client.root / {"ours": "secret-hybrid", "baseline": "secret-teacher"}[method] / name
        os.utime(path, (1e9 + index, 1e9 + index))
        whole = client.get(f"/videos/{token}")
        assert whole.content == path.read_bytes() and whole.headers["content-type"] == "video/mp4"
        part = client.get(f"/videos/{token}", headers={"range": "bytes=10-29"})
        assert part.status_code == 206 and part.content == whole.content[10:30]
        assert part.headers["content-range"] == f"bytes 10-29/{len(whole.content)}"
        assert client.get(f"/videos/{token}", headers={"range": "bytes=99999999-"}).status_code == 416
        dates.add(whole.headers["last-modified"])
        assert name not in str(whole.headers) and method not in str(whole.headers)
    assert len(dates) == 1


def test_a_page_of_another_host_is_not_served(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400


def test_a_video_replaced_by_a_link_is_no_longer_served(client):
    question = ask(client, "enter", "linker")["question"]
    method, name = client.store.find_video(question["left"])
    path = client.root / {"ours": "secret-hybrid", "baseline": "secret-teacher"}[method] / name
    kept = path.read_bytes()
    path.unlink()
    path.symlink_to(client.root / "outside.mp4")
    try:
        assert client.get(f"/videos/{question['left']}").status_code == 404
    finally:
        path.unlink()
        path.write_bytes(kept)
    assert client.get(f"/videos/{question['left']}").status_code == 200


NONSENSE = [None, 3, [], {}, {"token": None}, {"token": ["x"], "choice": {}}, {"token": "x", "choice": "left"}]


@pytest.mark.parametrize("data", NONSENSE)
def test_nonsense_from_the_network_is_answered_with_an_error(client, data):
    error = ask(client, "vote", data)["error"]
    assert "expected one of left, right, none" in error or "not of this study" in error
    assert "letters, digits" in ask(client, "enter", {"rater": data})["error"]
    assert client.store.votes() == []


def raw_request(server: Server, method: str, path: str) -> tuple[int, bytes]:
    """A request whose path goes out as it stands; clients would resolve `..` themselves."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(method, path)
    reply = connection.getresponse()
    body = reply.read()
    connection.close()
    return reply.status, body


def test_nothing_but_offered_videos_can_be_requested(server):
    inside = server.root / "secret-hybrid" / NAMES[0].replace(" ", "%20")
    outside = server.root / "outside.mp4"
    outside.write_bytes(b"ftyp outside")
    names = [path.name for path in (inside, outside)]
    paths = [
        *(f"/gradio_api/file={path}" for path in (inside, outside, "/etc/passwd", "v.sqlite", "http://127.0.0.1/")),
        *(f"/gradio_api/{call}" for call in ("info", "upload", "queue/join", "proxy=http://127.0.0.1/", "app_id")),
        *("/config", "/docs", "/openapi.json", "/monitoring", "/file=/etc/passwd", "/gradio_api/file/etc/passwd"),
        *("/gradio_api/component_server/../file=/etc/passwd", "/videos/../gradio_api/file=/etc/passwd"),
        *("/videos/", "/videos/..", "/videos/../", "/videos/x", "/videos/%00", "/videos/../v.sqlite"),
        *(f"/videos/{up}{name}" for name in names for up in ("", "../", "..%2f", "%2e%2e/", "..%5c", "x/../../", "/")),
        *("/static/../../../../../../../../etc/passwd", "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd"),
        *("/assets/..%2f..%2f..%2froutes.py", f"/static/{inside}", f"/assets/{inside}", "/static//etc/passwd"),
    ]
    for path in paths:
        for method in ("GET", "POST", "HEAD"):
            status, body = raw_request(server, method, path)
            assert status in (403, 404, 405), (method, path, status)
            assert not any(part in body for part in (b"root:", b"ftyp", b"SQLite", b"import "))
    assert raw_request(server, "GET", "/")[0] == 200


# --- in the browser --------------------------------------------------------------------------------------------------


def test_no_name_reaches_the_page_or_its_network(browser, server):
    context = browser.new_context()
    page = context.new_page()
    seen: list[str] = []
    hosts = set()

    def keep(response: Any) -> None:
        hosts.add(response.url.split("/")[2])
        kind = response.headers.get("content-type", "")
        body = "" if kind.startswith(("video", "image", "font")) else response.text()
        seen.extend([response.url, str(response.headers), str(response.request.post_data), body])

    page.on("response", keep)
    page.goto(server.url)
    enter(page, "prober")
    seen.append(page.content())
    for number in (1, 2):
        at_pair(page, number)
        unlocked(page)
        page.keyboard.press("n")
    at_pair(page, 3)
    unlocked(page)  # its videos have arrived
    seen.append(page.content())
    text = "\n".join(seen)
    assert len(text) > 100_000 and text.count("/videos/") >= 6
    for secret in SECRETS:
        assert secret.casefold() not in text.casefold(), secret
    assert hosts == {f"127.0.0.1:{server.port}"}  # nothing is fetched from anywhere else
    context.close()


def test_answers_unlock_after_both_played_through_in_step(browser, server):
    with opened(browser, server) as page:
        page.wait_for_selector(".study[data-screen=enter]")
        page.fill("#rater", "watcher")
        page.click("text=Start")
        page.wait_for_selector(".study[data-screen=pair]")
        page.keyboard.press("a")  # too early
        assert page.locator(".answers button:disabled").count() == 3
        assert page.inner_text(".hint") == "Watch both to the end to answer."
        unlocked(page)
        at_pair(page, 1)
        page.keyboard.press("r")
        gaps = page.evaluate("""async () => {
            const [a, b] = document.querySelectorAll('video'), gaps = [];
            while (gaps.length < 12) {
                await new Promise((resolve) => setTimeout(resolve, 60));
                if (!a.paused && !b.paused) gaps.push(Math.abs(a.currentTime - b.currentTime));
            }
            return gaps;
        }""")
        assert sorted(gaps)[len(gaps) // 2] < 1 / 16  # one frame
        page.keyboard.press(" ")
        page.wait_for_function("[...document.querySelectorAll('video')].every((video) => video.paused)")
        page.locator(".seek").fill("0.5")
        page.wait_for_function(
            "[...document.querySelectorAll('video')].every((v) => Math.abs(v.currentTime - .1875) < .02)"
        )
        assert [vote for vote in server.votes() if vote.rater == "watcher"] == []


def test_keys_and_buttons_give_the_three_answers(browser, server):
    with opened(browser, server) as page:
        enter(page, "keys")
        for number, key in enumerate(("ArrowLeft", "b", "n"), start=1):
            at_pair(page, number)
            unlocked(page)
            page.keyboard.press(key)
        at_pair(page, 4)
        unlocked(page)
        page.click("[data-choice=right]")
        page.wait_for_selector(".study[data-screen=done]")
        assert "4 of 4 answered" in page.inner_text(".done")
        page.reload()
        page.wait_for_selector(".study[data-screen=done]")
        page.click(".done .leave")
        page.wait_for_selector(".study[data-screen=enter]")
        page.fill("#rater", "two words")
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('.error')?.textContent.includes('letters, digits')")
    assert [vote.side for vote in server.votes() if vote.rater == "keys"] == ["left", "right", "none", "right"]


def test_a_double_click_and_a_reload_count_once(browser, server):
    with opened(browser, server) as page:
        enter(page, "twice")
        page.dblclick("[data-choice=left]")
        at_pair(page, 2)
        unlocked(page)
        # Two clicks and a key in one turn of the event loop, before any reply.
        page.evaluate("""() => {
            document.querySelector('[data-choice=right]').click();
            document.querySelector('[data-choice=left]').click();
            document.dispatchEvent(new KeyboardEvent('keydown', { key: 'n' }));
        }""")
        at_pair(page, 3)
        time.sleep(0.3)
        assert [vote.side for vote in server.votes() if vote.rater == "twice"] == ["left", "right"]
        unlocked(page)
        # The request goes out, and the page is gone before the reply: it stands once, wherever the rater goes on.
        page.evaluate("document.querySelector('[data-choice=none]').click(); location.reload()")
        page.wait_for_selector(".study[data-screen=pair]")
        page.reload()
        page.wait_for_selector(".study[data-screen=pair]")
        done = [vote.side for vote in server.votes() if vote.rater == "twice"]
        assert done in (["left", "right"], ["left", "right", "none"])
        at_pair(page, len(done) + 1)


def test_videos_that_do_not_load_are_tried_again(browser, server):
    with opened(browser, server) as page:
        page.route("**/videos/*", lambda route: route.abort())
        page.wait_for_selector(".study[data-screen=enter]")
        page.fill("#rater", "patchy")
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('.hint')?.textContent.startsWith('A video does not load')")
        page.keyboard.press("a")
        page.unroute("**/videos/*")
        unlocked(page)
        at_pair(page, 1)
    assert [vote for vote in server.votes() if vote.rater == "patchy"] == []


def test_two_raters_at_once(browser, server):
    with opened(browser, server) as anna, opened(browser, server) as ben:
        enter(anna, "anna")
        enter(ben, "ben")
        for number in range(1, len(NAMES) + 1):
            for page in (anna, ben):
                at_pair(page, number)
                unlocked(page)
            anna.keyboard.press("a")
            ben.keyboard.press("b")
        for page in (anna, ben):
            page.wait_for_selector(".study[data-screen=done]")
    votes = [vote for vote in server.votes() if vote.rater in ("anna", "ben")]
    assert Counter((vote.rater, vote.side) for vote in votes) == {("anna", "left"): 4, ("ben", "right"): 4}
    assert len({(vote.rater, vote.name) for vote in votes}) == 8


def test_killed_in_the_middle_of_voting_nothing_is_lost_or_doubled(browser, server):
    """Raters vote as fast as they can over HTTP, one more in the browser; SIGKILL; the same server again."""
    import httpx

    with httpx.Client(base_url=server.url, timeout=5) as http:
        text = http.get("/").text
        start = text.index("window.gradio_config = ") + len("window.gradio_config = ")
        components = json.JSONDecoder().raw_decode(text[start:])[0]["components"]
        component = next(entry["id"] for entry in components if entry["type"] == "html")

        def post(function: str, data: Any) -> Any:
            body = {"data": data, "component_id": component, "fn_name": function, "session_hash": "by-hand"}
            return http.post("gradio_api/component_server/", json=body).json()

        acknowledged: list[tuple[str, int]] = []

        def hurry(first: int) -> None:
            for number in range(first, 10_000, 4):
                try:
                    state = post("enter", f"hurry-{number}")
                    while state["question"]:
                        state = post("vote", {"token": state["question"]["token"], "choice": "left"})
                        acknowledged.append((state["rater"], state["done"]))
                except httpx.HTTPError:
                    return  # the server is dead

        with opened(browser, server) as page:
            enter(page, "patient")
            page.keyboard.press("a")
            at_pair(page, 2)
            unlocked(page)
            with ThreadPoolExecutor(4) as pool:
                runs = [pool.submit(hurry, first) for first in range(4)]
                while len(acknowledged) < 40:
                    time.sleep(0.01)
                server.kill()
                for run in runs:
                    run.result()
            kept = Counter(vote.rater for vote in server.votes())
            for rater, done in acknowledged:
                assert kept[rater] >= done
            assert max(count for rater, count in kept.items() if rater.startswith("hurry")) <= len(NAMES)

            page.click("[data-choice=right]")  # while nobody listens
            page.wait_for_selector(".offline:not([hidden])")
            server.start()
            at_pair(page, 3)  # without a reload: the answer was sent again
            page.wait_for_selector(".offline", state="hidden")
            page.reload()
            at_pair(page, 3)
            unlocked(page)
            page.keyboard.press("n")
            at_pair(page, 4)
        patient = [(vote.rater, vote.side) for vote in server.votes() if vote.rater == "patient"]
        assert patient == [("patient", "left"), ("patient", "right"), ("patient", "none")]
        assert len({(vote.rater, vote.name) for vote in server.votes()}) == len(server.votes())


def test_the_whole_pair_fits_the_window(browser, server):
    with opened(browser, server) as page:
        enter(page, "measure")
        for width, height in ((1280, 800), (400, 800), (800, 390)):
            page.set_viewport_size({"width": width, "height": height})
            inside = page.evaluate("""() => {
                const parts = [...document.querySelectorAll('.pair video, .answers button')];
                return parts.every((part) => {
                const { left, right, top, bottom, width } = part.getBoundingClientRect();
                return left >= 0 && right <= innerWidth && top >= 0 && bottom <= innerHeight && width > 80;
                });
            }""")
            assert inside and page.evaluate("document.documentElement.scrollWidth") == width
