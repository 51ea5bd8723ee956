"""The status page: the state of the service, for people."""

from __future__ import annotations

import time
from html import escape

from rpd_sb3.contract.teacher import TeacherSpec
from rpd_sb3.serve.engine import Engine
from rpd_sb3.serve.metrics import Metrics

# color-scheme: without it a dark page flashes white at every reload. overflow-wrap: names and paths of models are long.
STYLE = """
:root{color-scheme:light dark;--dim:#666;--line:#ddd;--ready:#16713a;--loading:#8a5a00;--failed:#b3261e}
@media(prefers-color-scheme:dark){:root{--dim:#999;--line:#3c3c3c;--ready:#6fd195;--loading:#f0b849;--failed:#ff8a80}}
body{font:16px/1.5 system-ui,sans-serif;max-width:36rem;margin:2rem auto;padding:0 1rem;overflow-wrap:anywhere}
h1{font-size:1.4rem} h2{font-size:1rem;margin:1.5rem 0 .3rem}
.ready{color:var(--ready)} .loading{color:var(--loading)} .failed{color:var(--failed)}
.reason{border-left:.25rem solid var(--failed);padding-left:.75rem;white-space:pre-wrap}
table{border-collapse:collapse;width:100%} th,td{border-top:1px solid var(--line);padding:.3rem 0;vertical-align:top}
th{font-weight:normal;text-align:left;white-space:nowrap;padding-right:1rem}
td{text-align:right;font-variant-numeric:tabular-nums} footer{margin-top:1.5rem;color:var(--dim);font-size:.875rem}
"""


def status_page(engine: Engine, name: str, version: str) -> str:
    """HTML that reloads itself every two seconds.

    :param engine: of the service
    :param name: of the model
    :param version: of the library
    """
    spec, metrics = engine.spec, engine.metrics
    state, _, reason = engine.state().partition(": ")
    mark = "ready" if engine.ready else "failed" if engine.error is not None else "loading"
    tables = "" if spec is None else _table("Teacher", _about(spec, engine)) + _table("Queries", _queries(engine))
    title = escape(name)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="2">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title} {escape(state)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{title} <span class="{mark}">{escape(state)}</span></h1>'
        + (f'<p class="reason">{escape(reason)}</p>' if reason else "")
        + f"{tables}<footer>Up for {_duration(time.time() - metrics.started)}. rpd_sb3 {escape(version)}. "
        'For machines: <a href="/metrics">/metrics</a></footer></body></html>'
    )


def _about(spec: TeacherSpec, engine: Engine) -> dict[str, str]:
    clients = len(engine.memory)
    return {
        "Name": spec.name,
        "Inputs": ", ".join(spec.inputs),
        "Labels": ", ".join(sorted(spec.labels)),
        "Environment": spec.env_id or "any",
        "Control mode": spec.control_mode or "any",
        "Memory": f"of {clients} client{'s' * (clients != 1)}" if spec.stateful else "none",
    }


def _queries(engine: Engine) -> dict[str, str]:
    metrics = engine.metrics
    answered = metrics.total("requests_total", code="200")
    rows, batches = metrics.total("batch_size_sum"), metrics.total("batch_size_count")
    last = metrics.last_batch
    return {
        "Answered": f"{answered:,.0f}",
        "Refused": f"{metrics.total('requests_total') - answered:,.0f}",
        "Waiting": f"{engine.waiting} (at most {engine.queue_size})",
        "Last answer": "none yet" if last is None else f"{_duration(time.time() - last)} ago",
        "Labels given": f"{rows:,.0f}",
        "Mean latency": _mean_ms(metrics, "request_seconds"),
        "of it, in the queue": _mean_ms(metrics, "queue_seconds"),
        "Mean batch": f"{rows / batches:.1f} (at most {engine.max_batch})" if batches else "-",
    }


def _table(title: str, rows: dict[str, str]) -> str:
    cells = (f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in rows.items())
    return f"<h2>{escape(title)}</h2><table>{''.join(cells)}</table>"


def _mean_ms(metrics: Metrics, name: str) -> str:
    count = metrics.total(f"{name}_count")
    return f"{1000 * metrics.total(f'{name}_sum') / count:.1f} ms" if count else "-"


def _duration(seconds: float) -> str:
    """The two largest units, e.g. ``2 h 5 min``."""
    minutes, rest = divmod(max(int(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((i for i, (number, _) in enumerate(parts) if number), len(parts) - 1)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2])
