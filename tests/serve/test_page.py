"""What the service's status page says."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import requests

from rpd_sb3.serve.batch import PendingQuery
from rpd_sb3.serve.engine import Engine
from rpd_sb3.serve.metrics import Metrics
from rpd_sb3.serve.page import _duration, status_page
from rpd_sb3.teachers import Query, Teacher
from tests.support.helpers import EchoTeacher
from tests.support.serving_helpers import serving, states


def named(name: str) -> EchoTeacher:
    teacher = EchoTeacher()
    teacher.spec = replace(teacher.spec, name=name)
    return teacher


def failing() -> Teacher:
    raise OSError("no <weights> in 'a & b'")


def started(load: Callable[[], Teacher]) -> Engine:
    """An engine whose teacher has been loaded, or has failed to."""
    engine = Engine(load, Metrics())
    engine.start()
    if load is failing:
        assert engine.finished.wait(10)
    else:
        query = Query({"state": states(4)}, np.arange(4), np.zeros(4, bool))
        while engine.spec is None:
            assert not engine.finished.wait(0.01)
        engine.submit(PendingQuery(query)).result(10)
    return engine


def heading(page: str) -> str:
    return re.sub(r"<.*?>", "", re.findall(r"<h1>(.*?)</h1>", page)[0])


def table(page: str) -> dict[str, str]:
    rows = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', page)
    return {html.unescape(key): html.unescape(value) for key, value in rows}


def test_a_loading_teacher_has_a_heading_and_no_numbers() -> None:
    page = status_page(Engine(EchoTeacher, Metrics()), "teacher", "1.2.3")
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


class Tags(HTMLParser):
    """Checks that every tag is closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("load", [failing, lambda: named("<" * 200)], ids=["failed", "ready"])
def test_the_page_is_well_formed_loads_nothing_and_fits_a_phone(load: Callable[[], Teacher]) -> None:
    engine = started(load)
    page = status_page(engine, "teacher" * 20, "1.2.3")
    engine.close()
    Tags(page)
    assert not re.search(r"https?:|//|src=|<script|<link|@import|url\(", page)
    assert 'name="viewport" content="width=device-width' in page
    assert "overflow-wrap:anywhere" in page, "long names must not stick out"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.9, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (7500, "2 h 5 min"), (86400, "1 d 0 h"), (-3, "0 s")],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert _duration(seconds) == text
