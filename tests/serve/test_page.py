"""What the service's status page says, and how it looks in a browser of the machine."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import requests

from rpd_sb3.serve.batch import Job
from rpd_sb3.serve.engine import Engine
from rpd_sb3.serve.metrics import Metrics
from rpd_sb3.serve.page import _duration, status_page
from rpd_sb3.teachers import Teacher
from tests.support.helpers import EchoTeacher
from tests.support.serving_helpers import serving, states

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSER_TIMEOUT = 60.0
PHONE = 390
"""Width in CSS pixels."""

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path: apt-get install chromium")


def named(name: str) -> EchoTeacher:
    teacher = EchoTeacher()
    teacher.spec = replace(teacher.spec, name=name)
    return teacher


def failing() -> Teacher:
    raise OSError("no <weights> in 'a & b'")


def started(load: Callable[[], Teacher]) -> Engine:
    """An engine whose teacher has been loaded, or has failed to."""
    engine = Engine(load, Metrics("teacher"))
    engine.start()
    if load is failing:
        assert engine.finished.wait(10)
    else:
        job = Job({"state": states(4)}, 4, np.arange(4), np.zeros(4, bool))
        while engine.spec is None:
            assert not engine.finished.wait(0.01)
        engine.submit(job).result(10)
    return engine


def heading(page: str) -> str:
    return re.sub(r"<.*?>", "", re.findall(r"<h1>(.*?)</h1>", page)[0])


def table(page: str) -> dict[str, str]:
    rows = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', page)
    return {html.unescape(key): html.unescape(value) for key, value in rows}


def chromium(tmp_path: Path, url: str) -> str:
    """The page as the browser has understood it, after its scripts."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=BROWSER_TIMEOUT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_loading_teacher_has_a_heading_and_no_numbers() -> None:
    page = status_page(Engine(EchoTeacher, Metrics("teacher")), "teacher", "1.2.3")
    assert heading(page) == "teacher is loading"
    assert table(page) == {}
    assert "rpd_sb3 1.2.3" in page


def test_a_failed_teacher_tells_why() -> None:
    page = status_page(started(failing), "teacher", "1.2.3")
    assert heading(page) == "teacher failed"
    assert '<p class="reason">OSError: no &lt;weights&gt; in &#x27;a &amp; b&#x27;</p>' in page


def test_a_ready_teacher_tells_what_it_is() -> None:
    engine = started(EchoTeacher)
    page = status_page(engine, "teacher", "1.2.3")
    engine.close()
    about = {"Name": "echo", "Inputs": "state", "Labels": "action", "Environment": "any", "Memory": "none"}
    assert heading(page) == "teacher is ready"
    assert about.items() <= table(page).items()


def test_queries_are_counted() -> None:
    with serving() as service:
        body = {"inputs": [{"name": "state", "datatype": "FP32", "shape": [4, 3], "data": states(4).tolist()}]}
        for content in (body, body, {}):
            requests.post(f"{service.url}/v2/models/teacher/infer", json=content, timeout=10)
        rows = table(requests.get(service.url, timeout=10).text)
    assert {"Answered": "2", "Refused": "1", "Labels given": "8"}.items() <= rows.items()
    assert rows["Mean batch"] == "4.0 (at most 64)"
    assert re.fullmatch(r"[01] s ago", rows["Last answer"])
    assert re.fullmatch(r"\d+\.\d ms", rows["Mean latency"])


def test_everything_is_escaped() -> None:
    engine = started(lambda: named("<script>alert(1)</script>"))
    page = status_page(engine, '"><b>', "<u>")
    engine.close()
    assert table(page)["Name"] == "<script>alert(1)</script>"
    assert not re.search(r"<script|<b>|<u>", page)


def test_nothing_is_loaded_from_elsewhere() -> None:
    engine = started(EchoTeacher)
    page = status_page(engine, "teacher", "1.2.3")
    engine.close()
    assert not re.search(r"https?:|//|src=|<script|<link|@import|url\(", page)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.9, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (7500, "2 h 5 min"), (86400, "1 d 0 h"), (-3, "0 s")],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


@needs_browser
def test_a_browser_shows_the_name_of_the_teacher(tmp_path: Path) -> None:
    with serving(lambda: named("<my> teacher")) as service:
        dom = chromium(tmp_path, service.url)
    assert heading(dom) == "teacher is ready"
    assert "<td>&lt;my&gt; teacher</td>" in dom


@needs_browser
@pytest.mark.parametrize("load", [failing, lambda: named("x" * 200)], ids=["failed", "ready"])
def test_nothing_sticks_out_of_a_phone(load: Callable[[], Teacher], tmp_path: Path) -> None:
    engine = started(load)
    page = status_page(engine, "teacher" * 20, "1.2.3")
    engine.close()
    # A window of the browser has a least width, a frame has not. Same origin, so that the script may look into it.
    measure = "document.title = document.querySelector('iframe').contentDocument.documentElement.scrollWidth"
    frame = f'<iframe style="width:{PHONE}px;height:4000px;border:0" srcdoc="{html.escape(page)}"></iframe>'
    (tmp_path / "frame.html").write_text(f'<title>none</title><body onload="{measure}">{frame}</body>')
    dom = chromium(tmp_path, f"file://{tmp_path / 'frame.html'}")
    assert re.findall(r"<title>(.*?)</title>", dom)[0] == str(PHONE)
