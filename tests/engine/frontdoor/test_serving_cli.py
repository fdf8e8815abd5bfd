"""``python -m engine serve`` and the commands that talk to it, as an operator runs them."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples" / "engine"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
START_S = 120.0


@dataclass
class Ended:
    code: int
    out: str
    err: str


def engine(folder: Path, *arguments: object) -> Ended:
    """A command run in a folder until it ends."""
    done = subprocess.run(
        [sys.executable, "-m", "engine", *map(str, arguments)],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)


@dataclass
class Serving:
    process: subprocess.Popen[str]
    url: str
    said: str

    def ask(self, bearer: str = "", **fields: Any) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {bearer}"} if bearer else {})}
        request = urllib.request.Request(  # noqa: S310  (a loopback address)
            f"{self.url}/v1/images/generations", json.dumps({"prompt": "a lighthouse", **fields}).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@contextmanager
def serving(folder: Path, *arguments: object) -> Iterator[Serving]:
    """``serve`` on a free port, stopped by SIGTERM; what it said so far is in ``said``."""
    err = folder / "serve.err"
    with err.open("w") as said, (folder / "serve.out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "engine", "serve", "--listen", "127.0.0.1:0", *map(str, arguments)],
            cwd=folder, env=ENVIRONMENT, stdout=out, stderr=said, text=True,
        )  # fmt: skip
    try:
        until_s = time.monotonic() + START_S
        while "try: " not in err.read_text():
            assert process.poll() is None, err.read_text()
            assert time.monotonic() < until_s, err.read_text()
            time.sleep(0.05)
        text = err.read_text()
        found = re.search(r"ready on (http://127\.0\.0\.1:\d+)", text)
        assert found is not None
        yield Serving(process, found[1], text)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()
            process.wait()


def test_serve_without_arguments_makes_an_image_with_the_line_that_it_prints(tmp_path: Path) -> None:
    with serving(tmp_path) as one:
        line = one.said.partition("try: ")[2].strip()
        if shutil.which("curl") and shutil.which("python3"):
            subprocess.run(["bash", "-c", line], cwd=tmp_path, timeout=60, check=True)
            assert (tmp_path / "image.png").read_bytes().startswith(b"\x89PNG")
        from tests.engine.frontdoor.dispatcher_engine import png

        control = base64.b64encode(png(64, 64, 90)).decode()
        status, answer = one.ask(
            steps=3, seed=1, controlnets=[{"id": "canny", "image": control}], loras=[{"id": "ink", "scale": 0.5}]
        )
        assert status == 200, answer
        assert base64.b64decode(answer["data"][0]["b64_json"]).startswith(b"\x89PNG")
    assert one.process.returncode == 0


def mapped(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def test_a_served_life_status_apply_split_reload_records_and_an_end_in_good_order(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "in")
    files = ["--allocation", "in/allocation.json", "--catalogue", "in/catalogue.json"]
    with serving(tmp_path, "--model", "featherweight", *files) as one:
        assert one.ask(loras=[{"id": "ink"}])[0] == 200
        shown = engine(tmp_path, "status")
        assert shown.code == 0, shown.err
        assert re.search(r"base-0 +base +ready", shown.out)
        plain = json.loads(engine(tmp_path, "status", "--json").out)
        pids = {w["worker_id"]: w["pids"] for w in plain["engines"]["main"]["workers"]}
        for pid in [one.process.pid, *(pid for many in pids.values() for pid in many)]:
            assert "libtorch" not in mapped(pid)  # the front and featherweight workers do without

        done = json.loads(engine(tmp_path, "apply", "in/two_bases.json").out)
        assert done["started"] == ["base-1"]
        after = json.loads(engine(tmp_path, "status", "--json").out)
        assert {
            w["worker_id"]: w["pids"] for w in after["engines"]["main"]["workers"] if w["worker_id"] in pids
        } == pids

        assert engine(tmp_path, "split", "in/split.json").code == 0
        sides = {
            one.ask(user=f"user-{number}", loras=[{"id": "ink"}])[1]["diffplan"]["variant"] for number in range(40)
        }
        assert sides == {"ink-1", "ink-2"}
        catalogue = json.loads((tmp_path / "in" / "catalogue.json").read_text())
        entry = {"id": "chalk-1", "kind": "lora", "name": "chalk", "version": "1", "file": "seed:7"}
        (tmp_path / "in" / "catalogue.json").write_text(
            json.dumps({**catalogue, "entries": [*catalogue["entries"], entry]})
        )
        until_s = time.monotonic() + 20  # the file is looked at every second
        while one.ask(loras=[{"id": "chalk"}])[0] == 404:
            assert time.monotonic() < until_s
            time.sleep(0.1)
        assert json.loads(engine(tmp_path, "reload").out)["catalogue_entries"] == 6
        assert one.ask(loras=[{"id": "chalk"}])[0] == 200
        (tmp_path / "in" / "catalogue.json").write_text("{")
        broken = engine(tmp_path, "reload")
        assert (broken.code, "is not JSON" in broken.err) == (2, True)
        assert one.ask(loras=[{"id": "chalk"}])[0] == 200
        missing = engine(tmp_path, "apply", "in/nothing.json")
        assert (missing.code, "cannot be read" in missing.err) == (2, True)
    assert one.process.returncode == 0, (tmp_path / "serve.err").read_text()
    rows = [json.loads(line) for line in (tmp_path / "serve.out").read_text().splitlines()]
    done = {row["request_id"] for row in rows if row["http_status"] == 200}
    assert len(done) == 44
    assert engine(tmp_path, "records", "--out", "tables").code == 0
    records = pd.read_parquet(tmp_path / "tables" / "requests.parquet")
    assert set(records["request_id"]) == done
    assert set(records["variant"]) == {"main", "ink-1", "ink-2"}
    assert "base-1" in set(pd.read_parquet(tmp_path / "tables" / "workers.parquet")["worker_id"])


def test_two_allocations_side_by_side_with_tokens(tmp_path: Path) -> None:
    drawn = engine(tmp_path, "token", "acme")
    secret, entry = drawn.out.strip(), json.loads(drawn.err.splitlines()[-1])
    tenants = tmp_path / "tenants.json"
    tenants.write_text(json.dumps({"schema_version": 1, "tenants": [entry]}))
    tenants.chmod(0o600)
    shares = [{"name": "a", "share": 0.5}, {"name": "b", "share": 0.5, "engine": "second"}]
    (tmp_path / "split.json").write_text(json.dumps({"variants": shares}))
    with serving(
        tmp_path, "--model", "featherweight", "--also", f"second={EXAMPLES / 'two_bases.json'}", "--split", "split.json",
        "--devices", "second=cpu", "--tenants", "tenants.json", "--log", "requests.jsonl",
    ) as one:  # fmt: skip
        assert one.ask()[0] == 401
        answers = [one.ask(secret, user=f"user-{number}") for number in range(16)]
        assert {status for status, _ in answers} == {200}
        plain = json.loads(engine(tmp_path, "status", "--json").out)
        done = {name: state["dispatch"]["n_ended"]["done"] for name, state in plain["engines"].items()}
        assert sum(done.values()) == 16
        assert min(done.values()) > 0
        drained = engine(tmp_path, "drain")
        assert drained.code == 0, drained.err
        assert one.process.wait(30) == 0
    log = (tmp_path / "requests.jsonl").read_text()
    assert {json.loads(line)["tenant_id"] for line in log.splitlines()} == {"", "acme"}
    assert secret not in log


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--listen", "8188"], "--listen: got '8188', needs HOST:PORT"),
        (["serve", "--listen", "0.0.0.0:0"], "which other machines reach, and no tokens"),
        (["serve", "--devices", "gpu0"], "--devices: got 'gpu0'"),
        (["serve", "--devices", "b=cpu"], "names the engine 'b'"),
        (["serve", "--option", "x"], "--option: got 'x'"),
        (["serve", "--also", "x"], "--also: got 'x'"),
        (["serve", "--also", f"b={EXAMPLES / 'allocation.json'}"], "needs --split FILE"),
        (["serve", "--allocation", "none.json"], "none.json: cannot be read"),
        (["serve", "--catalogue", "none.json"], "none.json: cannot be read"),
        (["serve", "--tenants", "none.json"], "none.json: cannot be read"),
        (["serve", "--split", str(EXAMPLES / "allocation.json")], "is not a known field"),
        (["serve", "--allocation", str(EXAMPLES / "allocation.json"), "--devices", "cuda:0"], "the allocation needs 2"),
        (["serve", "--catalogue", "small.json", "--allocation", str(EXAMPLES / "allocation.json")], "names the base 'default'"),
        (["serve", "--model", "featherweight", "--run-dir", "small.json/run"], "small.json/run: cannot be made"),
        (["serve", "--model", "featherweight", "--listen", "127.0.0.1:0", "--admin", "x" * 120], "AF_UNIX path too long"),
        (["status"], "no engine listens"),
        (["apply", str(EXAMPLES / "allocation.json")], "no engine listens"),
        (["records", "--out", "x"], "holds no records"),
        (["replay", "--trace", "sample:katz_a_hour", "--allocation", str(EXAMPLES / "allocation.json"), "--out", "x"],
         "is not in the catalogue"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)  # fmt: skip
def test_a_mistake_is_a_sentence_and_exit_code_2(
    tmp_path: Path,
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from engine.__main__ import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.json").write_text('{"schema_version": 2, "entries": []}')
    monkeypatch.setattr(sys, "argv", ["engine", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert words in said
    assert "Traceback" not in said


def test_a_replay_writes_tables_that_join_with_the_trace(tmp_path: Path) -> None:
    done = engine(
        tmp_path, "replay", "--trace", "sample:katz_a_hour", "--allocation", EXAMPLES / "any_model.json", "--model",
        "featherweight", "--out", "run", "--synthesise-addons", "--speed", "400", "--requests", "40", "--size-px", "64",
        "--steps", "4", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert (summary["n_due"], summary["n_by_status"]) == (40, {"done": 40})
    trace = pd.read_parquet(tmp_path / "run" / "trace.parquet")
    requests = pd.read_parquet(tmp_path / "run" / "requests.parquet")
    assert list(trace["request_id"]) == list(requests["request_id"])
    again = engine(
        tmp_path, "replay", "--trace", "sample:katz_a_hour", "--allocation", EXAMPLES / "any_model.json", "--out", "run",
        "--synthesise-addons",
    )  # fmt: skip
    assert (again.code, "is not empty" in again.err) == (2, True)


def test_a_missing_package_is_named_with_the_extra_that_has_it(tmp_path: Path) -> None:
    code = "import sys\nsys.modules['aiohttp'] = None\nsys.argv = ['engine', 'serve']\nfrom engine.__main__ import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'diffplan[engine]'" in done.stderr
    assert "Traceback" not in done.stderr
