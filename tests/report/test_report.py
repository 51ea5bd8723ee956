"""What a report says of runs with known numbers, and how it looks in a browser of the machine."""

from __future__ import annotations

import base64
import csv
import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpd_sb3.contract.statistics import wilson_interval
from rpd_sb3.report import __main__ as report
from rpd_sb3.report import page as page_module
from rpd_sb3.report import tables, words
from rpd_sb3.report.groups import Group, group_records, mean_curve
from rpd_sb3.report.page import render
from rpd_sb3.report.records import read_records
from tests.support.browser import PHONE, chromium, needs_browser
from tests.support.report_helpers import AGREEMENT, K, make_run, result
from tests.support.train_helpers import rpd, save_teacher, sentence, trained


def read(*folders: str) -> dict[str, list[Group]]:
    return group_records(read_records(folders))


def only(*folders: str) -> Group:
    ((group,),) = read(*folders).values()
    return group


def page(*folders: str) -> str:
    return render(read(*folders))


def text(content: str) -> str:
    """What is read on a page, its spaces merged."""
    content = re.sub(r"<(style|svg)\b.*?</\1>", "", content, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<.*?>", " ", content)).replace("\u00a0", " ").split())


def table(content: tables.Table) -> dict[str, dict[str, str]]:
    return {row.name: dict(zip(content.columns, (cell.text for cell in row.cells))) for row in content.rows}


# Groups and curves ----------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_are_one_group(tmp_path: Path) -> None:
    group = only(*(make_run(tmp_path / str(seed), seed=seed) for seed in (2, 0, 1)))
    assert [record.seed for record in group.records] == [0, 1, 2]
    assert group.label == "rpd_ppo"


def test_the_seed_of_a_teachers_noise_is_a_seed(tmp_path: Path) -> None:
    configs = [{"teacher_kwargs": {"noise": 0.3, "seed": seed}} for seed in (1, 2)]
    only(*(make_run(tmp_path / str(i), seed=i, config=config) for i, config in enumerate(configs)))


def test_runs_of_other_configurations_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / str(gamma), config={"gamma": gamma}) for gamma in (0.8, 0.9)]
    (groups,) = read(*folders, make_run(tmp_path / "ppo", "ppo")).values()
    assert [group.label for group in groups] == ["rpd_ppo (gamma 0.8)", "rpd_ppo (gamma 0.9)", "ppo"]


def test_many_differences_are_left_to_the_table(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"gamma": 0.8, "n_timesteps": 7, "policy_kwargs": {"net_arch": [9]}}]
    (groups,) = read(*(make_run(tmp_path / str(i), config=change) for i, change in enumerate(changes))).values()
    assert [group.label for group in groups] == ["rpd_ppo (configuration 1)", "rpd_ppo (configuration 2)"]
    assert table(tables.difference_table(groups)) == {
        "n_timesteps": {groups[0].label: "200", groups[1].label: "7"},
        "gamma": {groups[0].label: "0.99", groups[1].label: "0.8"},
        "policy_kwargs.net_arch": {groups[0].label: "[8]", groups[1].label: "[9]"},
    }


def test_curves_are_averaged_where_all_of_them_are_known() -> None:
    curve = mean_curve([(np.array([0, 10, 20]), np.array([0.0, 1.0, 2.0])), (np.array([5, 15]), np.array([2.5, 5.5]))])
    assert curve.steps.tolist() == [5, 10, 15]
    assert curve.mean.tolist() == [1.5, 2.5, 3.5]
    assert curve.std == pytest.approx([np.std([0.5, 2.5], ddof=1), np.std([1, 4], ddof=1), np.std([1.5, 5.5], ddof=1)])


def test_one_seed_has_no_deviation() -> None:
    assert mean_curve([(np.array([0, 10]), np.array([0.0, 1.0]))]).std.tolist() == [0.0, 0.0]


def test_curves_that_share_no_steps_have_no_mean() -> None:
    assert mean_curve([(np.array([0, 1]), np.zeros(2)), (np.array([5, 6]), np.zeros(2))]).steps.tolist() == []


# Words ----------------------------------------------------------------------------------------------------------------


def test_the_headline_of_one_task(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "rpd"), make_run(tmp_path / "ppo", "ppo", successes=(0, 0, 1))]
    assert words.headline(read(*folders)) == "rpd_ppo reaches 90 % on PickCube-v1; its teacher 40 %, ppo 10 %"


def test_the_headline_is_about_the_best(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "rpd", successes=(0, 0, 2)), make_run(tmp_path / "ppo", "ppo", successes=(0, 0, 3))]
    assert words.headline(read(*folders)) == "ppo reaches 30 % on PickCube-v1; rpd_ppo 20 %"


def test_the_headline_of_several_tasks(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / str(i), env=f"Task{i}-v1", successes=(0, 0, i)) for i in range(1, 6)]
    assert words.headline(read(*folders)) == (
        "rpd_ppo reaches 10 % on Task1-v1 (teacher 40 %), rpd_ppo reaches 20 % on Task2-v1 (teacher 40 %), "
        "rpd_ppo reaches 30 % on Task3-v1 (teacher 40 %), and 2 more tasks"
    )


def test_the_headline_without_success_is_the_return(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", successes=None)
    assert words.headline(read(folder)) == "rpd_ppo returns 6.5 on PickCube-v1; its teacher 40.0"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (words.count(155_663), "155,663"),
        (words.count(13_190_000), "13.19 M"),
        (words.count(7_541_000_000), "7.54 G"),
        (words.size(622_652), "622.7 kB"),
        (words.milliseconds(0.1026), "0.10 ms"),
        (words.milliseconds(1.26), "1.3 ms"),
        (words.times(36_400.0), "36,400×"),
        (words.duration(59.6), "1 min 00 s"),
        (words.duration(7384), "2 h 03 min"),
        (words.percent(None), words.DASH),
    ],
)
def test_numbers_are_written_as_people_read_them(value: str, shown: str) -> None:
    assert value == shown


# Tables ---------------------------------------------------------------------------------------------------------------


def test_success_counts_the_episodes_of_all_seeds(tmp_path: Path) -> None:
    group = only(*(make_run(tmp_path / str(seed), seed=seed, successes=(0, 5, 7 + seed)) for seed in range(3)))
    rate = group.rate("once")
    assert rate == (24 / 30, *wilson_interval(24, 30), 30)
    rows = table(tables.success_table([group]))
    assert rows["rpd_ppo"] == {
        "success once": "80 %",
        "at the end": "43 %",  # the even ones of 7, 8 and 9: 4, 4 and 5
        "episodes": "30",
        "seeds": "3",
        "steps": "200",
        "training": "1 min 00 s",
    }


def test_the_time_of_a_resumed_run_is_not_known(tmp_path: Path) -> None:
    content = tables.success_table([only(make_run(tmp_path / "run", content=result(resumed_at=100)))])
    assert content.rows[-1].cells[-1] == tables.Cell("–", note=1)
    assert content.notes == ["not known of runs that have not ended, or were resumed"]


def test_a_teacher_that_all_seeds_share_is_counted_once(tmp_path: Path) -> None:
    group = only(*(make_run(tmp_path / str(seed), seed=seed) for seed in range(3)))
    assert group.teacher_rate("success_once") == (pytest.approx(0.4), *wilson_interval(4, K), K)
    rows = table(tables.success_table([group]))
    assert list(rows) == ["teacher scripted (noise 0.3)", "rpd_ppo"]
    assert rows["teacher scripted (noise 0.3)"]["episodes"] == f"{K}"


def test_cost_of_teacher_and_student(tmp_path: Path) -> None:
    content = tables.cost_table([only(make_run(tmp_path / "run"))])
    assert table(content) == {
        "teacher scripted (noise 0.3)": {
            "success": "40 %",
            "parameters": "7.50 G",
            "weights": "15.0 GB",
            "latency": "300 ms",
            "speed-up": "",
        },
        "rpd_ppo": {
            "success": "90 %",
            "parameters": "1,000",
            "weights": "4.0 kB",
            "latency": "0.50 ms",
            "speed-up": "600×",
        },
    }
    assert content.notes == []


def test_what_is_not_known_is_a_dash_with_its_reason(tmp_path: Path) -> None:
    scripted = result(teacher_parameters=None, teacher_bytes=None)
    (groups,) = read(make_run(tmp_path / "rpd", content=scripted), make_run(tmp_path / "ppo", "ppo")).values()
    content = tables.cost_table(groups)
    rows = {row.name: row.cells for row in content.rows}
    assert [cell.text for cell in rows["teacher scripted (noise 0.3)"]] == ["40 %", "–", "–", "300 ms", ""]
    assert [cell.note for cell in rows["teacher scripted (noise 0.3)"]] == [None, 1, 1, None, None]
    assert rows["ppo"][-1] == tables.Cell("–", note=2)
    assert content.notes == [
        "the teacher does not say; a scripted one has no weights, a remote one may not know",
        "no teacher to compare with",
    ]


def test_agreement_is_averaged_over_the_seeds(tmp_path: Path) -> None:
    other = AGREEMENT | {"bias": [0.2, *AGREEMENT["bias"][1:]], "correlation": [None, *AGREEMENT["correlation"][1:]]}
    folders = [make_run(tmp_path / "0"), make_run(tmp_path / "1", seed=1, content=result(agreement=other))]
    content = tables.agreement_table(only(*folders))
    assert content is not None
    rows = table(content)
    assert list(rows) == ["x", "y", "z", "rotation x", "rotation y", "rotation z", "gripper"]
    assert rows["x"] == {
        "mean |difference|": "0.100",
        "bias": "+0.100",
        "teacher's std": "0.500",
        "correlation": "1.00",
    }
    assert (rows["y"]["bias"], rows["rotation x"]["correlation"], rows["gripper"]["correlation"]) == (
        "−0.100",
        "−0.50",
        "–",
    )
    assert content.notes == ["200 observations of the student's own episodes"]


def test_dimensions_of_an_unknown_controller_are_numbered() -> None:
    assert words.dimension_names(None, 3) == ["0", "1", "2"]
    assert words.dimension_names("pd_ee_delta_pose", 3) == ["0", "1", "2"]


# The page -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str]:
    """Two seeds with films and a baseline, and their page."""
    folder = tmp_path_factory.mktemp("runs")
    films = ("video.mp4", "teacher_video.mp4")
    folders = [make_run(folder / str(seed), seed=seed, videos=films) for seed in range(2)]
    folders.append(make_run(folder / "ppo", "ppo", successes=(0, 0, 1)))
    return folders, page(*folders)


def test_the_page_says_everything(shown: tuple[list[str], str]) -> None:
    content = shown[1]
    said = text(content)
    title = "rpd_ppo reaches 90 % on PickCube-v1; its teacher 40 %, ppo 10 %"
    assert text(re.findall("<title>.*?</title>", content)[0]) == text(re.findall("<h1>.*?</h1>", content)[0]) == title
    for heading in ("Success", "Teacher and student", "Agreement of rpd_ppo with its teacher", "Updates", "Videos"):
        assert heading in said
    for figure in ("Success at any step", "Success at the last step", "Entropy of the student", "Distillation loss"):
        assert f"<figcaption>{figure}</figcaption><svg" in content
    assert "python -m rpd_sb3.train --algo ppo --env PickCube-v1 --seed 0" in said
    assert content.count("data:video/mp4;base64,") == 2
    assert base64.b64encode(b"film video.mp4").decode() in content
    assert base64.b64encode(b"film teacher_video.mp4").decode() in content


def test_the_page_needs_nothing_else(shown: tuple[list[str], str]) -> None:
    content = re.sub(r"base64,[^\"]*", "", shown[1])
    assert not re.search(r"https?:|//|<script|@import|<link(?! rel=\"icon\" href=\"data:,\")", content)
    assert set(re.findall(r'(?:src|href)="(#|data:|[^"]{0,9})', content)) == {"#", "data:"}


def test_ids_of_the_page_are_unique_and_what_is_referred_to_is_there(tmp_path: Path) -> None:
    content = page(*(make_run(tmp_path / env, env=env) for env in ("A-v1", "B-v1")), make_run(tmp_path / "p", "ppo"))
    ids = re.findall(r'\bid="([^"]+)"', content)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', content)) <= set(ids)


def test_colours_are_those_of_the_page(shown: tuple[list[str], str]) -> None:
    figures = "".join(re.findall("<svg.*?</svg>", shown[1], re.DOTALL))
    assert "var(--c0)" in figures
    assert "var(--text)" in figures
    assert not re.search(r"#[0-9a-f]{6}\b(?!\")", re.sub(r'"#[^"]*"|url\(#[^)]*\)', "", figures))


def test_entropy_is_drawn_with_its_own_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    monkeypatch.setattr(page_module, "draw", lambda name, describe, lines, *_: drawn.update({describe: lines}) or "")
    page(make_run(tmp_path / "run"))
    (line,) = drawn["entropy of the student over environment steps on PickCube-v1"]
    assert (line.curve.steps.tolist(), line.curve.mean.tolist()) == ([100, 200], [3.0, 2.0])


def test_the_same_runs_give_the_same_page(shown: tuple[list[str], str]) -> None:
    folders, content = shown
    assert page(*folders) == content


EVIL = "<script>alert('$x')</script>\"&"


def test_everything_is_escaped(tmp_path: Path) -> None:
    config = {"teacher": EVIL, "teacher_kwargs": {EVIL: EVIL}, "note": EVIL}
    folder = tmp_path / "a<b>"
    make_run(folder, env=EVIL, config=config, content={})
    content = page(str(folder), make_run(tmp_path / "ppo", "ppo", env=EVIL, config={"note": "<i>"}))
    assert "<script" not in content
    assert "<b>" not in content
    assert "alert('$x')</script" not in content
    assert EVIL in html.unescape(content)


def test_a_run_that_has_not_ended_is_shown_with_what_there_is(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", content={})
    (tmp_path / "run" / "progress.csv").unlink()
    (tmp_path / "run" / "command.txt").unlink()
    said = text(page(folder))
    assert "rpd_ppo reaches 90 % on PickCube-v1" in said
    assert f"Not ended, or stopped; the numbers are those so far: {folder}." in said
    assert f"Teacher not evaluated: {folder}." in said
    assert "2 The run was made by an older version, or has not ended." in said
    for absent in ("Agreement", "Updates", "Videos", "Commands"):
        assert absent not in said


def test_a_run_of_an_older_version_is_shown_with_what_there_is(tmp_path: Path) -> None:
    new = ("student_bytes", "teacher_parameters", "teacher_bytes", "latency_ms", "teacher_latency_ms", "agreement")
    content = {key: value for key, value in result().items() if key not in new}
    folder = make_run(tmp_path / "run", content=content)
    said = text(page(folder))
    assert "No agreement and no costs, as the run was made by an older version" in said
    assert "Not ended, or stopped" not in said
    assert "teacher 40 %" in said


def test_a_student_without_a_teacher_is_filmed_alone(tmp_path: Path) -> None:
    said = text(page(make_run(tmp_path / "run", "ppo", videos=("video.mp4",))))
    assert "Videos" in said
    assert "no video of the teacher" not in said
    assert "Dashed" not in said
    said = text(page(make_run(tmp_path / "rpd", videos=("video.mp4",))))
    assert "no video of the teacher" in said


def test_returns_are_drawn_where_there_is_no_success(tmp_path: Path) -> None:
    content = page(make_run(tmp_path / "run", successes=None))
    assert "<figcaption>Return of an episode</figcaption><svg" in content
    assert "Success at" not in text(content)


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_page_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make_run(tmp_path / str(seed), seed=seed) for seed in range(2)]
    ppo = make_run(tmp_path / "ppo", "ppo", successes=None, env="Other-v0")
    out, numbers = tmp_path / "report.html", tmp_path / "numbers.csv"
    assert report.main([*folders, ppo, "-o", str(out), "--csv", str(numbers)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "rpd_ppo reaches 90 % on PickCube-v1 (teacher 40 %), ppo returns 6.5 on Other-v0"
    assert [line.split()[0] for line in lines[1:]] == [str(out), str(numbers)]
    assert out.read_text().startswith("<!doctype html>")
    with open(numbers, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["timesteps"]) for row in rows] == [
        (folder, str(n)) for folder in [*folders, ppo] for n in (0, 100, 200)
    ]
    low, high = wilson_interval(9, K)
    assert rows[2] == {
        "run": folders[0],
        "algo": "rpd_ppo",
        "env": "PickCube-v1",
        "group": "rpd_ppo",
        "seed": "0",
        "complete": "True",
        "timesteps": "200",
        "n_episodes": "10",
        "success_once": "0.9",
        "ci95_low": str(low),
        "ci95_high": str(high),
        "success_at_end": "0.5",
        "mean_return": "6.5",
        "std_return": str(np.arange(K).std()),
        "mean_length": "50.0",
        "teacher": "scripted (noise 0.3)",
        "teacher_success_once": "0.4",
        "teacher_success_at_end": "0.2",
        "teacher_mean_return": "40.0",
        "student_parameters": "1000",
    }
    assert (rows[-1]["success_once"], rows[-1]["teacher"], rows[-1]["mean_return"]) == ("", "", "6.5")


def damage(name: str, content: bytes) -> Any:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "evaluations.npz").unlink(), "no evaluation yet"),
        (damage("evaluations.npz", b"PK"), "evaluations.npz"),
        (lambda folder: np.savez(folder / "evaluations.npz", timesteps=[0], results=[0], ep_lengths=[0]), "damaged"),
        (damage("result.json", b"{"), "result.json"),
        (damage("result.json", b"[]"), "result.json holds list"),
        (damage("args.yml", b"algo: ppo"), "the env"),
    ],
)
def test_a_damaged_run_is_one_sentence(
    change: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run")
    change(Path(folder))
    assert message in sentence([folder, "-o", str(tmp_path / "report.html")], capsys, report)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "RUN_DIR"),
        (["nix"], "'nix' does not exist"),
        (["run", "./run/"], "named twice"),
        (["run", "-o", "nix/report.html"], "folder 'nix' does not exist"),
        (["run", "-o", "run"], "run/report.html"),
        (["run", "-o", "a", "--csv", "./a"], "--csv ./a"),
    ],
)
def test_mistake_is_one_sentence(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    assert message in sentence(argv, capsys, report)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# In a browser ---------------------------------------------------------------------------------------------------------


def framed(content: str, tmp_path: Path, measure: str) -> str:
    """What a script measures of the page in a frame as wide as a phone; a window has a least width, a frame has not."""
    frame = f'<iframe style="width:{PHONE}px;height:844px;border:0" srcdoc="{html.escape(content)}"></iframe>'
    script = f"const page = document.querySelector('iframe').contentDocument; document.title = {measure}"
    (tmp_path / "frame.html").write_text(f'<title>none</title><body onload="{html.escape(script)}">{frame}</body>')
    return re.findall(r"<title>(.*?)</title>", chromium(tmp_path, f"file://{tmp_path / 'frame.html'}"))[0]


@needs_browser
def test_nothing_sticks_out_of_a_phone(tmp_path: Path) -> None:
    long = {"note": "x" * 300, "policy_kwargs": {"y" * 90: list(range(90))}, "teacher": "openvla:" + "path/" * 40}
    folders = [make_run(tmp_path / ("z" * 100 + str(i)), seed=i, config=long, content=[None, {}][i]) for i in range(2)]
    content = page(*folders, make_run(tmp_path / "ppo", "ppo")).replace("<details>", "<details open>")
    wider = "page.documentElement.scrollWidth - page.documentElement.clientWidth"
    assert framed(content, tmp_path, wider) == "0"


@needs_browser
def test_letters_of_a_figure_are_legible_on_a_phone(tmp_path: Path) -> None:
    content = page(make_run(tmp_path / "run"))
    scale = "page.querySelector('svg').getBoundingClientRect().width / page.querySelector('svg').viewBox.baseVal.width"
    assert 10 * float(framed(content, tmp_path, scale)) > 9.5  # pixels; figures are set in 10 points


@needs_browser
def test_a_real_run_plays_in_a_browser(tmp_path: Path) -> None:
    argv = rpd(tmp_path / "logs", save_teacher(tmp_path / "teacher.zip"), n=32)
    argv.remove("--no-video")
    content = page(str(trained(argv)))
    said = text(content)
    assert "67 268 B" in said
    assert "No video" not in said
    sizes = "[...page.querySelectorAll('video')].map(v => v.videoWidth + 'x' + v.videoHeight).join(' ')"
    assert framed(content, tmp_path, sizes) == "32x16 32x16"
